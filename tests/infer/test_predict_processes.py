"""Several processes answer as one does: from a download folder, through the launcher, by every command."""

import json
import os
import re
import signal
import subprocess
import time

import pytest
from launched import INFER, command, download_folder, launch, launcher_words
from model_fixtures import RandomModel
from predict_model import QUESTIONS, SIZES, asked, oracle_answer, write_yaml

NEW_TOKENS = 6
EXPERTS = {"expert_num": 4, "num_experts_chosen": 2}
PARALLEL = ["--max_new_tokens", NEW_TOKENS, "--use_parallel", "True", "--auto_trans_ckpt", "True"]


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> RandomModel:
    folder = tmp_path_factory.mktemp("experts")
    return RandomModel(folder, seed=8, **SIZES, num_experts=4, num_experts_per_tok=2)


def said_by(random, tokenizer, prompt: list[int], count: int = NEW_TOKENS) -> str:
    return tokenizer.decode(oracle_answer(random, prompt, count), skip_special_tokens=True)


def answers_in(stdout: str) -> str:
    """What is between the launcher's notes, those of the processes and the figures."""
    notes = ("Start ", "config: ", "vocabulary: ", "prompt format: ", "system text: ", "model_config: ", "[")
    return "".join(line for line in stdout.splitlines(keepends=True) if not line.startswith(notes))


def batch_through(script, processes, random, predictor, small_vocab, tmp_path) -> None:
    """A batch of questions in a file is answered by ``processes`` as by the oracle."""
    folder = download_folder(random, small_vocab, tmp_path / "hf")
    kv_heads = random.sizes.get("num_key_value_heads", random.sizes["n_head"])
    sections = {"moe_config": EXPERTS} if "num_experts" in random.sizes else {}
    file = write_yaml(tmp_path / "p.yaml", {"n_kv_heads": kv_heads}, **sections)
    lines = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ["--yaml_file", file, "--checkpoint_path", folder, *PARALLEL, "--batch_size", 3]
    line = command(script, *words, "--input_txt", tmp_path / "questions.jsonl")
    told = launch(line, processes, tmp_path / "run")
    assert told.returncode == 0, told.stdout + told.stderr
    tokenizer = predictor.tokenizer
    texts = [said_by(random, tokenizer, predictor.prompt_ids(asked(text))) for text in QUESTIONS]
    expected = "".join(f"{text}\n{said}\n\n" for text, said in zip(QUESTIONS, texts, strict=True))
    assert expected in answers_in(told.stdout + told.stderr if processes == 1 else told.stdout)
    assert "[3 answers, 18 tokens, " in told.stdout + told.stderr
    if processes > 1:
        assert told.stderr == ""
        others = [tmp_path / "run" / "logs" / f"worker_{rank}.log" for rank in range(1, processes)]
        assert not any(texts[0] in log.read_text(encoding="utf-8", errors="replace") for log in others)


def test_two_processes_answer_a_batch_from_a_download_folder(random, predictor, small_vocab, tmp_path):
    batch_through(INFER, 2, random, predictor, small_vocab, tmp_path)


def test_two_processes_with_experts_keep_a_conversation_that_one_process_hears(
    experts, predictor, small_vocab, tmp_path
):
    """The others are told what the first reads; one YAML serves for one process and for two."""
    folder = download_folder(experts, small_vocab, tmp_path / "hf")
    file = write_yaml(tmp_path / "p.yaml", moe_config=EXPERTS)
    line = command("run_telechat_predict.py", "--yaml_file", file, "--checkpoint_path", folder, *PARALLEL)
    told = launch(line, 2, tmp_path / "run", stdin=f"{QUESTIONS[0]}\n/new\n{QUESTIONS[1]}\n")
    assert told.returncode == 0, told.stdout + told.stderr
    prompts = [predictor.prompt_ids(asked(text)) for text in QUESTIONS[:2]]
    assert answers_in(told.stdout) == "".join(
        f"{said_by(experts, predictor.tokenizer, prompt)}\n" for prompt in prompts
    )
    assert told.stdout.count("[6 tokens, cut off there by --max_new_tokens, the first after") == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("processes", [1, 4])
def test_other_numbers_of_processes_do_so_too(kind, processes, predictor, small_vocab, tmp_path):
    sizes = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
    moe = {"num_experts": 4, "num_experts_per_tok": 2} if kind == "experts" else {}
    random = RandomModel(tmp_path / "random", seed=3, **sizes, **moe)
    script = "infer/run_telechat_predict_parallel.py"
    batch_through(script, processes, random, predictor, small_vocab, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_run_mindformer_shares_a_model_too(random, predictor, small_vocab, tmp_path, processes):
    """From a download folder; the answer is written once."""
    folder = download_folder(random, small_vocab, tmp_path / "hf")
    tokenizer = predictor.tokenizer
    start, user, bot = map(tokenizer.vocabulary.special_ids.get, ("<_start>", "<_user>", "<_bot>"))
    prompt = [start, user, *tokenizer.encode_text(QUESTIONS[0]), bot]
    file = write_yaml(tmp_path / "p.yaml", {"max_decode_length": len(prompt) + NEW_TOKENS})
    words = ["--config", file, "--load_checkpoint", folder, "--run_mode", "predict", "--use_parallel", "True"]
    words += ["--auto_trans_ckpt", "True", "--processor.tokenizer.vocab_file", folder / "tokenizer.model"]
    words += ["--predict_data", f"<_start><_user>{QUESTIONS[0]}<_bot>", "--output_dir", "out"]
    told = launch(command("run_mindformer.py", *words), processes, tmp_path / "run")
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr
    whole = tokenizer.decode([*prompt, *oracle_answer(random, prompt, NEW_TOKENS)], skip_special_tokens=True)
    assert f"\n{whole}\n" in told.stdout
    (file,) = (tmp_path / "run" / "out").glob("text_generation_result*.txt")
    assert whole in file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_processes_of_run_mindformer_draw_the_same_tokens(random, predictor, small_vocab, tmp_path):
    """By the seed of the shipped YAML, which is 0: were it none, each would go on with its own token."""
    folder = download_folder(random, small_vocab, tmp_path / "hf")
    file = write_yaml(tmp_path / "p.yaml", {"max_decode_length": 40, "do_sample": True, "top_k": 300})
    words = ["--config", file, "--load_checkpoint", folder, "--run_mode", "predict", "--use_parallel", "True"]
    words += ["--auto_trans_ckpt", "True", "--processor.tokenizer.vocab_file", folder / "tokenizer.model"]
    words += ["--predict_data", f"<_start><_user>{QUESTIONS[0]}<_bot>", "--output_dir", "out"]
    told = launch(command("run_mindformer.py", *words), 2, tmp_path / "run")
    assert told.returncode == 0, told.stdout[-3000:] + told.stderr
    logs = [(tmp_path / "run" / "logs" / f"worker_{rank}.log").read_text("utf-8") for rank in range(2)]
    first, second = (set(re.findall(r"'text_generation_text': .*", log)) for log in logs)
    assert first == second and len(first) == 1


def test_a_mistake_is_one_sentence_for_all_processes(random, small_vocab, tmp_path):
    folder = download_folder(random, small_vocab, tmp_path / "hf")
    file = write_yaml(tmp_path / "p.yaml")
    given = ["--yaml_file", file, "--checkpoint_path", folder]
    cases = [
        (INFER, 4, [*given, "--use_parallel", "True"], "n_kv_heads 2 is not divisible by .*model_parallel 4"),
        (INFER, 2, given, "use_parallel is False, but 2 processes run"),
        ("run_mindformer.py", 2, ["--config", file, "--predict_data", "no.txt", "--run_mode", "predict",
                                  "--use_parallel", "True", "--load_checkpoint", "no"], "vocab_file"),
    ]  # fmt: skip
    for script, processes, words, said in cases:
        told = launch(command(script, *words), processes, tmp_path / "run")
        assert told.returncode != 0
        assert len(told.stderr.splitlines()) == 1 and "Traceback" not in told.stdout
        assert "error: " not in told.stdout and re.match(f"error: .*{said}", told.stderr), told.stderr


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_with_one_sentence(random, small_vocab, tmp_path):
    """The terminal sends it to the launcher's process group, while the first process waits for a question."""
    folder = download_folder(random, small_vocab, tmp_path / "hf")
    file = write_yaml(tmp_path / "p.yaml")
    line = command(INFER, "--yaml_file", file, "--checkpoint_path", folder, *PARALLEL)
    job = subprocess.Popen(
        launcher_words(line, 2), cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    job.stdin.write(f"{QUESTIONS[0]}\n")
    job.stdin.flush()
    for told in job.stdout:
        if told.startswith("[6 tokens"):
            break
    os.killpg(job.pid, signal.SIGINT)
    assert job.wait(60) == 130
    assert job.stderr.read() == "interrupted: the workers are ended; their logs are in logs\n"
    time.sleep(1)
    left = subprocess.run(["pgrep", "-f", str(file)], capture_output=True, text=True).stdout
    assert left == ""
