"""run_telechat_predict.py, and run_mindformer.py where it predicts, as a user runs them."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

from predict_model import CHECKOUT, NEW_TOKENS, QUESTIONS, asked, oracle_answer, write_yaml
from refusal import refused


def predict(*words, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        str(CHECKOUT / "research" / "telechat2" / "run_telechat_predict.py"),
        *map(str, words),
    ]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=300)


def test_the_command_answers_and_keeps_a_conversation(random, small_vocab, config_file, predictor, tmp_path):
    words = [
        "--yaml_file",
        config_file,
        "--vocab_file_path",
        small_vocab,
        "--checkpoint_path",
        random.weights,
    ]
    words += ["--max_new_tokens", 6, "--do_sample", "False"]
    told = predict(*words, cwd=tmp_path, stdin=f"{QUESTIONS[0]}\n/new\n{QUESTIONS[1]}\n")
    assert told.returncode == 0, told.stderr
    prompts = [predictor.prompt_ids(asked(text)) for text in QUESTIONS[:2]]
    texts = [
        predictor.tokenizer.decode(oracle_answer(random, prompt, 6), skip_special_tokens=True)
        for prompt in prompts
    ]
    assert told.stdout == "".join(f"{text}\n" for text in texts)
    assert not any(tmp_path.iterdir())
    # and no warning, no note of the libraries
    config, numbers, chosen, system, *figures = told.stderr.splitlines()
    assert numbers.startswith(f"model_config: taken from {random.weights}.config.json: rms_norm_eps 1e-05")
    assert system.startswith("system text: 你是中国电信星辰语义大模型") and "--system" in system
    assert config == f"config: {config_file}" and chosen.startswith("prompt format: chat (none is recorded")
    assert len(figures) == 2 and all(line.startswith("[6 tokens, cut off there by --max") for line in figures)


def test_the_command_shows_the_plugins_own_warnings_and_goes_on_after_a_long_line(
    random, small_vocab, predictor, tmp_path
):
    """The second of three questions is too long: exit code 1, since standard input is no person."""
    room = len(predictor.prompt_ids(asked("x"))) + 10
    write_yaml(tmp_path / "p.yaml", {"num_blocks": 15, "max_decode_length": room})
    words = ["--yaml_file", "p.yaml", "--vocab_file_path", small_vocab, "--checkpoint_path", random.weights]
    words += ["--auto_trans_ckpt", "False", "--use_parallel", "False"]
    told = predict(*words, cwd=tmp_path, stdin=f"x\n{'word ' * 60}\ny\n")
    assert told.stdout.count("\n") >= 2 and told.returncode == 1
    said = told.stderr.splitlines()
    assert any(line.startswith("WARNING: The paged cache holds 240 tokens, fewer than") for line in said)
    assert sum("(not asked: the prompt has" in line for line in said) == 1
    assert said[-1] == "error: 1 lines of standard input were not asked; see above."


def test_mistakes_end_in_one_sentence(random, small_vocab, config_file, tmp_path):
    """Through the real command: exit code 1, nothing on stdout, one line on stderr, no litter."""
    vocab, weights = ["--vocab_file_path", small_vocab], ["--checkpoint_path", random.weights]
    typo = write_yaml(tmp_path / "typo.yaml", {"num_layer": 2})
    small = write_yaml(tmp_path / "small.yaml", {"vocab_size": 500})
    ascend = write_yaml(tmp_path / "ascend.yaml", context={"device_target": "Ascend"})
    (tmp_path / "empty.yaml").write_text("run_mode: predict\n")
    cases = [
        (["--yaml_file", config_file, *weights], "names no vocab_file; give --vocab_file_path"),
        (["--yaml_file", config_file, *vocab], "names no load_checkpoint; give --checkpoint_path"),
        (
            ["--yaml_file", config_file, *vocab, "--checkpoint_path", "no"],
            "--checkpoint_path no does not exist",
        ),
        (["--yaml_file", config_file, *weights, "--vocab_file_path", "no"], "--vocab_file_path no does not"),
        (["--yaml_file", "predict_telechat_tyni.yaml"], "predict_telechat_tiny.yaml"),
        (["--yaml_file", "empty.yaml"], "has no section model.model_config"),
        (["--yaml_file", config_file, "--src_strategy_path_or_dir", "s"], "_or_dir s: .*/transform_ckpt.py"),
        (["--yaml_file", config_file, "--batch_size", "0"], "--batch_size is 0"),
        (["--yaml_file", typo, *vocab, *weights], "num_layer is read by nothing.*num_layers is there"),
        (["--yaml_file", config_file, "--repetition_penalty", "nan"], "repetition_penalty is nan"),
        (["--yaml_file", config_file, "--seed", "-1"], "--seed is -1"),
        (["--yaml_file", config_file, "--question_file", "no.txt"], "--question_file no.txt does not exist"),
        (["--yaml_file", small, *vocab, *weights], "tokens, but the YAML's vocab_size is 500"),
        (["--yaml_file", ascend, *vocab, *weights], "Ascend"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for words, said in cases:
        told = predict(*words, "hi", cwd=tmp_path)
        assert (told.returncode, told.stdout) == (1, ""), (words, told.stderr)
        *config, error = told.stderr.splitlines()
        assert error.startswith("error: ") and re.search(said, error), (words, told.stderr)
        assert [line.split(": ")[0] for line in config] in ([], ["config"]), (words, told.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def raw_prompt(text: str, tokenizer) -> tuple[str, list[int]]:
    """A prompt as the README writes it, and its ids."""
    start, user, bot = map(tokenizer.vocabulary.special_ids.get, ("<_start>", "<_user>", "<_bot>"))
    return f"<_start><_user>{text}<_bot>", [start, user, *tokenizer.encode_text(text), bot]


def run_mindformer(*words, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(CHECKOUT / "run_mindformer.py"), "--run_mode", "predict", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_run_mindformer_answers_a_raw_prompt_with_the_same_ids(random, small_vocab, predictor, tmp_path):
    raw, prompt = raw_prompt(QUESTIONS[0], predictor.tokenizer)
    (answer,) = predictor.generate([prompt])
    file = write_yaml(tmp_path / "predict.yaml", {"max_decode_length": len(prompt) + NEW_TOKENS})
    words = ["--config", file, "--load_checkpoint", random.weights, "--predict_data", raw]
    words += ["--processor.tokenizer.vocab_file", small_vocab, "--output_dir", "out"]
    told = run_mindformer(*words, cwd=tmp_path)
    assert told.returncode == 0, told.stderr[-3000:]
    whole = predictor.tokenizer.decode([*prompt, *answer.ids], skip_special_tokens=True)
    assert told.stdout.endswith(f"{whole}\n") and answer.text and whole.endswith(answer.text)


def test_run_mindformer_samples_on_a_cpu_as_the_seed_says(random, small_vocab, predictor, tmp_path):
    """The same seed gives the same answer, 0 too, and it is not the likeliest one; top_k 0 is all tokens."""
    raw, prompt = raw_prompt(QUESTIONS[0], predictor.tokenizer)
    greedy = predictor.tokenizer.decode(oracle_answer(random, prompt, 16), skip_special_tokens=True)
    file = write_yaml(tmp_path / "p.yaml", {"max_decode_length": len(prompt) + 16, "top_k": 0})
    words = ["--config", file, "--load_checkpoint", random.weights, "--predict_data", raw, "--seed", 0]
    words += ["--do_sample", "True", "--processor.tokenizer.vocab_file", small_vocab]
    found = []
    for output in ("first", "second"):
        told = run_mindformer(*words, "--output_dir", output, cwd=tmp_path)
        assert told.returncode == 0, told.stderr[-3000:]
        found.append(told.stdout.rsplit("生抽与老抽的区别？", 1)[1].rstrip("\n"))
    assert found[0] == found[1] != greedy


def test_run_mindformer_pads_by_the_tokenizer_where_the_model_has_no_padding(
    random, small_vocab, predictor, tmp_path
):
    """The batch size need not divide the number of prompts."""
    raw, prompts = zip(*(raw_prompt(text, predictor.tokenizer) for text in QUESTIONS), strict=True)
    longest = max(map(len, prompts))
    file = write_yaml(tmp_path / "p.yaml", {"pad_token_id": -1, "max_decode_length": longest + 4})
    (tmp_path / "prompts.txt").write_text("\n".join(raw), encoding="utf-8")
    words = ["--config", file, "--load_checkpoint", random.weights, "--predict_data", "prompts.txt"]
    words += ["--processor.tokenizer.vocab_file", small_vocab, "--predict_batch_size", 2, "--output_dir", "o"]
    told = run_mindformer(*words, cwd=tmp_path)
    assert told.returncode == 0, told.stderr[-3000:]
    for prompt in prompts:
        whole = [*prompt, *oracle_answer(random, prompt, longest + 4 - len(prompt))]
        text = predictor.tokenizer.decode(whole, skip_special_tokens=True)
        assert text.removesuffix("\ufffd") in told.stdout  # it ends before a character that is cut


def test_run_mindformer_refuses_prompts_that_cannot_be_answered(random, small_vocab, tmp_path):
    file = write_yaml(tmp_path / "p.yaml", {"max_decode_length": 40})
    words = [
        "--config",
        file,
        "--load_checkpoint",
        random.weights,
        "--predict_data",
        "<_user>" + "word " * 60,
    ]
    told = run_mindformer(*words, "--processor.tokenizer.vocab_file", small_vocab, cwd=tmp_path)
    assert told.returncode == 1 and "Traceback" not in told.stderr
    said = (
        r"^error: prompt 1 of 1: the prompt has \d+ tokens, .* may have 40 \(the YAML's max_decode_length\)"
    )
    assert re.search(said, told.stderr, re.MULTILINE), told.stderr[-2000:]


def test_prompts_of_run_mindformer_are_read_and_checked(small_vocab, tmp_path):
    from mindformers.models.build_tokenizer import build_tokenizer

    from research.telechat2.compat.library import MindFormerConfig
    from research.telechat2.run.prediction import prepare_prompts

    def prepare(*words, **model_config):
        tokenizer = {"type": "TelechatTokenizer", "vocab_file": str(small_vocab)}
        model = {"model_config": {"vocab_size": 600, "seq_length": 30} | model_config}
        config = MindFormerConfig(input_data=list(words), processor={"tokenizer": tokenizer}, model=model)
        found = prepare_prompts(config)
        assert build_tokenizer(config.processor.tokenizer).whole_characters  # answers end before a cut one
        return found, config.model.model_config.pad_token_id

    file = tmp_path / "prompts.txt"
    file.write_text("<_user>第一\\n？<_bot>\r\n<_user>b<_bot>", encoding="utf-8")
    assert prepare(str(file), pad_token_id=-1) == (["<_user>第一\n？<_bot>", "<_user>b<_bot>"], 3)
    assert prepare("<_user>b<_bot>", pad_token_id=3) == ("<_user>b<_bot>", 3)
    assert prepare("a", "b", pad_token_id=3) == (["a", "b"], 3)
    for number, words in enumerate(
        [["no.txt"], ["no/questions.jsonl.gz"], [str(tmp_path)], [str(file), "a"], ["a", "no.json"]]
    ):
        with refused(f"--predict_data {'no.json' if number == 4 else words[0]}"):
            prepare(*words)
    for name, text in (("data.jsonl", '{"input": "a"}\n'), ("empty.txt", "")):
        (tmp_path / name).write_text(text)
        with refused("--predict_data", name):
            prepare(str(tmp_path / name))
    for text in ("what is README.md?", "<_user>no.txt<_bot>", "a.b", "README", "你好。txt"):
        assert prepare(text, pad_token_id=3)[0] == text
    file.write_text("<_user>a<_bot>\n\n<_user>b<_bot>\n")
    with refused("prompt 2 of 3"):
        prepare(str(file))
    with refused("prompt 2 of 2"):
        prepare("a", "\u3000\u200b")
    # a token for each byte, as no piece holds it, after SentencePiece's space before the text
    assert prepare("\x01" * 28, max_decode_length=512, pad_token_id=3)[1] == 3
    with refused("prompt 2 of 2", "30 tokens", "seq_length"):
        prepare("a", "\x01" * 29)
    file.write_text("\ufeff<_user>a<_bot>\n\ufeff<_user>b<_bot>\ufeff\n", encoding="utf-8")
    assert prepare(str(file), pad_token_id=3)[0] == ["<_user>a<_bot>", "<_user>b<_bot>"]
    assert prepare("\ufeff<_user>a<_bot>", pad_token_id=3)[0] == "<_user>a<_bot>"
    with refused("prompt 2 of 2", "U+FEFF"):
        prepare("a", "b\ufeffc")
    for name in ("asks.jsonl", "asks.txt"):  # a prompt would be the JSON itself
        (tmp_path / name).write_text('{"instruction": "q", "output": ""}\n')
        with refused(name, "--question_file"):
            prepare(str(tmp_path / name))
    with refused("gone.txt"):
        prepare(str(tmp_path / "gone.txt"))
    assert prepare("what is a.txt ?", pad_token_id=3)[0] == "what is a.txt ?"
    with refused("eos_token_id is 5", "tokenizer.model", 2):
        prepare("a", eos_token_id=5)


def test_a_prompt_of_blanks_is_none_for_other_tokenizers_too(small_vocab):
    from research.telechat2.compat.library import MindFormerConfig
    from research.telechat2.run.prediction import prepare_prompts

    tokenizer = {"type": "LlamaTokenizer", "vocab_file": str(small_vocab)}
    settings = {"vocab_size": 600, "bos_token_id": 1, "eos_token_id": 2}
    config = MindFormerConfig(
        input_data=["a", " "], processor={"tokenizer": tokenizer}, model={"model_config": settings}
    )
    with refused("prompt 2 of 2"):
        prepare_prompts(config)
    config.input_data = ["a", "b"]
    assert prepare_prompts(config) == ["a", "b"]


def test_a_prediction_without_weights_or_with_an_impossible_batch_is_refused():
    from research.telechat2.run.prediction import check_request, check_vocab_file

    for config, named in (
        ({"load_checkpoint": ""}, ["--load_checkpoint"]),
        ({"load_checkpoint": "w", "predict_batch_size": 0}, ["predict_batch_size", 0]),
    ):
        with refused(*named):
            check_request(config)
    check_request({"load_checkpoint": "w", "predict_batch_size": None})
    check_request({"load_checkpoint": None, "checkpoint": {"load_path": "w"}, "predict_batch_size": 3})
    with refused("processor"):
        check_vocab_file({"load_checkpoint": "w"})


def test_prompts_of_a_flag_given_twice_are_all_asked(monkeypatch):
    program, found = runpy.run_path(str(CHECKOUT / "run_mindformer.py")), {}
    monkeypatch.setitem(
        program["main"].__globals__, "run", lambda config, overrides, *more: found.update(overrides)
    )
    words = ["run_mindformer.py", "--config", "c", "--predict_data", "a", "--seed", "1", "--predict_data"]
    monkeypatch.setattr(sys, "argv", [*words, "b", "c"])
    program["main"]()
    assert found == {"input_data": ["a", "b", "c"], "seed": 1}


def test_files_of_a_flag_given_twice_are_all_asked(monkeypatch):
    from research.telechat2.infer.command import parse_arguments

    words = ["run_telechat_predict.py", "--yaml_file", "p", "--question_file", "a", "--input_txt", "b"]
    monkeypatch.setattr(sys, "argv", [*words, "--question_file", "c"])
    found = parse_arguments()
    assert (found.question_file, found.input_txt, found.question) == (["a", "c"], ["b"], [])


def test_run_mindformer_asks_for_a_vocabulary_at_once(config_file, tmp_path):
    """The base YAML's vocab_file is empty."""
    words = ["--config", config_file, "--predict_data", "<_user>x<_bot>"]
    for more, said in (
        (
            [],
            "error: the config names no vocab_file; give --processor.tokenizer.vocab_file tokenizer.model.\n",
        ),
        (
            ["--processor.tokenizer.vocab_file", "no"],
            "error: processor.tokenizer.vocab_file is no, but there is",
        ),
    ):
        told = run_mindformer(*words, *more, cwd=tmp_path)
        assert told.returncode == 1 and told.stderr.startswith(said), told.stderr
        assert "mindformers" not in told.stdout and not any(tmp_path.iterdir())
