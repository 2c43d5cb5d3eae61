"""What the prediction scripts share: loading a model, asking it, streaming, history, files of questions."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from research.telechat2 import telechat_prompt_format
from research.telechat2.telechat_chat import encode, render
from research.telechat2.telechat_run_config import read_config

GENERATION_DEFAULTS = {
    "max_new_tokens": 512,
    "do_sample": False,
    "top_k": 1,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
}


@dataclass
class Answer:
    """What a model said: ``text`` without special tokens, ``ids`` with them, and how long it took."""

    text: str
    ids: list[int]
    seconds: float
    seconds_to_first_token: float

    def __str__(self) -> str:
        """A line of figures for a person."""
        later = self.seconds - self.seconds_to_first_token
        speed = f", {(len(self.ids) - 1) / later:.1f} tokens/s" if later > 0 and len(self.ids) > 1 else ""
        return f"[{len(self.ids)} tokens, the first after {self.seconds_to_first_token:.2f} s{speed}]"


@dataclass
class Predictor:
    """A model with its tokenizer and the prompt format it was tuned with.

    ``generation``: arguments of ``generate``, see GENERATION_DEFAULTS. ``max_length``: most tokens of prompt
    and answer together, at most the model's ``seq_length``.
    """

    model: object
    tokenizer: object
    prompt_format: str
    max_length: int
    generation: dict = field(default_factory=lambda: dict(GENERATION_DEFAULTS))

    def prompt_ids(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """The ids that ask for the next answer; raises ValueError if they leave no room for one."""
        segments = render(messages, tools, prompt_format=self.prompt_format, add_generation_prompt=True)
        ids, _ = encode(segments, self.tokenizer)
        if len(ids) >= self.max_length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but prompt and answer together may have "
                f"{self.max_length} (--max_length, at most the YAML's seq_length); shorten it or raise them."
            )
        return ids

    def generate(self, prompts: list[list[int]], on_token=None) -> list[Answer]:
        """Answer a batch of prompts given as ids; ``on_token(id)`` hears every token of a single prompt."""
        clock = _Clock(on_token if len(prompts) == 1 else None)
        longest = max(len(ids) for ids in prompts)
        settings = dict(self.generation)
        settings["max_new_tokens"] = min(settings["max_new_tokens"], self.max_length - longest)
        padded = [ids + [self.tokenizer.pad_token_id] * (longest - len(ids)) for ids in prompts]
        outputs = self.model.generate(np.array(padded, np.int32), streamer=clock, **settings)
        answers = [output[len(ids) :].tolist() for ids, output in zip(prompts, outputs, strict=True)]
        return [
            Answer(self.tokenizer.decode(ids, skip_special_tokens=True), ids, clock.total(), clock.first())
            for ids in answers
        ]

    def ask(self, messages: list[dict], on_text=None) -> Answer:
        """Answer a conversation; ``on_text(str)`` hears the answer as it grows, in whole characters."""
        from research.telechat2.telechat_tokenizer import StreamDecoder

        decoder = StreamDecoder(self.tokenizer)
        on_token = None if on_text is None else lambda index: on_text(decoder.put(index))
        answer = self.generate([self.prompt_ids(messages)], on_token)[0]
        if on_text is not None:
            on_text(decoder.end())
        return answer


class _Clock:
    """A MindFormers streamer that notes when tokens arrive: first the prompts are put, then each step."""

    def __init__(self, on_token):
        self.on_token = on_token
        self.times: list[float] = []

    def put(self, value):
        """Take the prompts, or one step's tokens."""
        if self.times and self.on_token is not None:
            self.on_token(value)
        self.times.append(time.perf_counter())

    def end(self):
        """Nothing is held back."""

    def total(self) -> float:
        """Seconds from the prompts to the last token."""
        return self.times[-1] - self.times[0]

    def first(self) -> float:
        """Seconds from the prompts to the first token."""
        return self.times[1] - self.times[0]


def load_predictor(
    yaml_file: str | Path,
    vocab_file: str | Path | None = None,
    checkpoint: str | Path | None = None,
    *,
    prompt_format: str | None = None,
    max_length: int | None = None,
    device_id: int = 0,
    batch_size: int = 1,
    use_past: bool | None = None,
    generation: dict | None = None,
) -> Predictor:
    """Build the model of a predict YAML and load its weights, all of them or none.

    Args:
        yaml_file: a predict YAML. The next three default to what it says.
        vocab_file: tokenizer.model.
        checkpoint: a converted checkpoint or the `checkpoint` folder of a training run.
        prompt_format: "chat" or "plain"; by default the one recorded with the checkpoint, else "chat".
        max_length: most tokens of prompt and answer together; by default ``seq_length``.
        device_id: which NPU.
        batch_size: most prompts at once.
        use_past: predict with a cache.
        generation: changes to GENERATION_DEFAULTS.

    Raises:
        ValueError: a file is missing or does not fit the others; names and shapes are given.
    """
    config = read_config(Path(yaml_file))
    settings = dict(config["model"]["model_config"], batch_size=batch_size)
    if use_past is not None:
        settings["use_past"] = use_past
    vocab_file = vocab_file or config["processor"]["tokenizer"].get("vocab_file")
    checkpoint = checkpoint or config.get("load_checkpoint")
    _check_files(yaml_file, vocab_file, checkpoint)
    prompt_format = prompt_format or telechat_prompt_format.find(checkpoint) or "chat"
    model = _build_model(config.get("context") or {}, settings, device_id)
    load_weights(model, checkpoint)
    from research.telechat2.telechat_tokenizer import TelechatTokenizer

    tokenizer = TelechatTokenizer(str(vocab_file))
    _check_vocabulary(tokenizer, vocab_file, model.config.vocab_size)
    seq_length = model.config.seq_length
    return Predictor(
        model, tokenizer, prompt_format, min(max_length or seq_length, seq_length),
        GENERATION_DEFAULTS | (generation or {}),
    )  # fmt: skip


def _check_files(yaml_file, vocab_file, checkpoint) -> None:
    """Refuse what is missing before the slow imports."""
    if not vocab_file:
        raise ValueError(f"{yaml_file} names no vocab_file; give --vocab_file_path tokenizer.model.")
    if not checkpoint:
        raise ValueError(
            f"{yaml_file} names no load_checkpoint; give --checkpoint_path, or the answers are noise."
        )
    for flag, path in (("--vocab_file_path", vocab_file), ("--checkpoint_path", checkpoint)):
        if not Path(path).exists():
            raise ValueError(f"{flag} {path} does not exist.")


def _check_vocabulary(tokenizer, vocab_file, vocab_size: int) -> None:
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"{vocab_file} has {tokenizer.vocab_size} tokens, but the YAML's vocab_size is {vocab_size}; "
            "this is another model's vocabulary."
        )


def _build_model(context: dict, settings: dict, device_id: int):
    import mindspore as ms

    ms.set_context(
        mode=ms.GRAPH_MODE, device_target=context.get("device_target", "Ascend"), device_id=device_id,
        jit_config={"jit_level": (context.get("jit_config") or {}).get("jit_level", "O0")},
    )  # fmt: skip
    if context.get("device_target", "Ascend") == "Ascend":
        ms.set_context(max_device_memory=context.get("max_device_memory", "58GB"))
    from mindspore.nn.utils import no_init_parameters

    from research.telechat2.telechat import TelechatForCausalLM
    from research.telechat2.telechat_config import TelechatConfig

    with no_init_parameters():
        model = TelechatForCausalLM(TelechatConfig(**settings))
    model.set_train(False)
    return model


def load_weights(model, checkpoint: str | Path) -> None:
    """Load every weight of ``model`` from a MindSpore checkpoint, one in memory at a time.

    Raises:
        ValueError: the checkpoint is broken, or its names or shapes are not the model's.
    """
    from mindspore import Tensor

    from research.telechat2.checkpoint import read_mindspore_tensors

    wanted = {name: p for name, p in model.parameters_and_names() if not name.endswith("_cache")}
    problems = []
    for name, array in read_mindspore_tensors(checkpoint):
        parameter = wanted.pop(name, None)
        if parameter is None:
            problems.append(f"{name} is not in the model")
        elif tuple(parameter.shape) != array.shape:
            problems.append(f"{name} is {list(array.shape)}, expected {list(parameter.shape)}")
        else:
            parameter.set_data(Tensor(array, parameter.dtype))
    problems += [f"{name} is missing" for name in wanted]
    if problems:
        listed = "; ".join(problems[:10])
        raise ValueError(
            f"{checkpoint} does not fit the model of the YAML, {len(problems)} tensors differ: {listed}"
            f"{'; …' if len(problems) > 10 else ''}. Use the YAML of this checkpoint's size."
        )
    model.init_parameters_data()


def read_questions(path: str | Path) -> list[list[dict]]:
    """Conversations that wait for an answer: a question on each line, or ``.jsonl`` lines of training data.

    Of a jsonl conversation the last answer is cut off.

    Raises:
        ValueError: an empty file, or a line that is no conversation (file and line are named).
    """
    from research.telechat2.data.formats import naming, parse_line, read_lines

    questions = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        if Path(path).suffix != ".jsonl":
            questions.append([{"role": "user", "content": line.rstrip("\n")}])
            continue
        with naming(path, number):
            messages = parse_line(line).messages
        questions.append(messages[:-1] if messages[-1]["role"] in ("assistant", "bot") else messages)
    if not questions:
        raise ValueError(f"{path} holds no question.")
    return questions


def answer_all(predictor: Predictor, questions: list[list[dict]], batch_size: int) -> None:
    """Answer conversations in batches, and print each with its question."""
    prompts = [predictor.prompt_ids(messages) for messages in questions]
    for start in range(0, len(prompts), batch_size):
        answers = predictor.generate(prompts[start : start + batch_size])
        for messages, answer in zip(questions[start:], answers, strict=False):
            print(f"{messages[-1]['content']}\n{answer.text}\n", flush=True)
        print(f"{len(answers)} answers: {answers[0]}", file=sys.stderr)


def chat(predictor: Predictor, system: str | None, lines) -> None:
    """Answer every line of ``lines`` in one conversation, streaming; ``/new`` starts another."""
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for line in lines:
        question = line.strip()
        if question == "/new":
            messages = list(start)
        if not question or question == "/new":
            continue
        messages.append({"role": "user", "content": question})
        _forget_until_it_fits(predictor, messages, keep=len(start))
        answer = predictor.ask(messages, on_text=lambda text: print(text, end="", flush=True))
        print(flush=True)
        print(answer, file=sys.stderr)
        messages.append({"role": "assistant", "content": answer.text})


def _forget_until_it_fits(predictor: Predictor, messages: list[dict], keep: int) -> None:
    """Drop the oldest question and answer until the prompt leaves room for an answer, saying so."""
    while len(messages) > keep + 1:
        try:
            predictor.prompt_ids(messages)
            return
        except ValueError:
            del messages[keep : keep + 2]
            print(
                "(the conversation grew too long: its oldest question and answer are forgotten)",
                file=sys.stderr,
            )
