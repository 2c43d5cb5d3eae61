"""What the prediction scripts share: loading a model, asking it, streaming, history, files of questions."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from research.telechat2 import telechat_prompt_format
from research.telechat2.data.formats import Conversation, naming, parse_line, read_lines
from research.telechat2.telechat_chat import encode, render
from research.telechat2.telechat_run_config import read_config

MAX_NEW_TOKENS = 512


@dataclass
class Answer:
    """What a model said: ``text`` without special tokens, ``ids`` with them, and how long its batch took.

    ``cut`` says that the answer ran into a limit of length before the model ended it.
    """

    text: str
    ids: list[int]
    cut: bool
    seconds: float
    seconds_to_first_token: float

    def __str__(self) -> str:
        """A line of figures for a person."""
        later = self.seconds - self.seconds_to_first_token
        speed = f", {(len(self.ids) - 1) / later:.1f} tokens/s" if later > 0 and len(self.ids) > 1 else ""
        cut = ", cut off there by --max_new_tokens or --max_length" if self.cut else ""
        return f"[{len(self.ids)} tokens{cut}, the first after {self.seconds_to_first_token:.2f} s{speed}]"


@dataclass
class Predictor:
    """A model with its tokenizer and the prompt format it was tuned with.

    ``max_length``: most tokens of prompt and answer together, at most the model's ``seq_length``.
    ``generation``: arguments of ``generate``; what is not there is as the model's config says.
    """

    model: object
    tokenizer: object
    prompt_format: str
    max_length: int
    generation: dict = field(default_factory=lambda: {"max_new_tokens": MAX_NEW_TOKENS})

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The ids that ask for the next answer of a conversation."""
        segments = render(
            conversation.messages, conversation.tools, prompt_format=self.prompt_format,
            add_generation_prompt=True, tool_tags_in_content=conversation.tool_tags_in_content,
        )  # fmt: skip
        return encode(segments, self.tokenizer)[0]

    def fits(self, prompt: list[int]) -> bool:
        """Whether a prompt leaves room for a token of answer."""
        return len(prompt) < self.max_length

    def check(self, prompts: list[list[int]]) -> None:
        """ValueError if a prompt leaves no room for an answer, or the cache has none for the batch."""
        for ids in prompts:
            if not self.fits(ids):
                raise ValueError(
                    f"the prompt has {len(ids)} tokens, but prompt and answer together may have "
                    f"{self.max_length} (--max_length, at most the YAML's seq_length); shorten it or raise "
                    f"them."
                )
        config = self.model.config
        needed = sum(-(-(len(ids) + self._room(ids)) // config.block_size) for ids in prompts)
        if config.use_past and needed > config.num_blocks:
            raise ValueError(
                f"{len(prompts)} prompts at once, with their answers, may need {needed} blocks of the cache, "
                f"which has {config.num_blocks} (the YAML's num_blocks, of {config.block_size} tokens each); "
                f"lower --batch_size, --max_new_tokens or --max_length, or raise num_blocks."
            )

    def _room(self, ids: list[int]) -> int:
        """Most tokens that an answer to ``ids`` may have."""
        return min(self.generation["max_new_tokens"], self.max_length - len(ids))

    def generate(self, prompts: list[list[int]], on_token=None) -> list[Answer]:
        """Answer a batch of prompts given as ids, each as if asked alone (unless it samples).

        ``on_token(id)`` hears every token of a single prompt. Raises ValueError as ``check`` does.
        """
        self.check(prompts)
        clock = _Clock(on_token if len(prompts) == 1 else None)
        longest = max(len(ids) for ids in prompts)
        # One limit for all rows: the largest. What a longer prompt may not use of it is taken off below.
        settings = self.generation | {"max_new_tokens": max(self._room(ids) for ids in prompts)}
        padded = [ids + [self.tokenizer.pad_token_id] * (longest - len(ids)) for ids in prompts]
        outputs = self.model.generate(np.array(padded, np.int32), streamer=clock, **settings)
        answers = []
        for prompt, output in zip(prompts, outputs, strict=True):
            ids = output[len(prompt) : len(prompt) + self._room(prompt)].tolist()
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            cut = ids[-1] != self.model.config.eos_token_id
            answers.append(Answer(text, ids, cut, clock.total(), clock.first()))
        return answers

    def ask(self, messages: list[dict], on_text=None) -> Answer:
        """Answer a conversation; ``on_text(str)`` hears the answer as it grows, in whole characters."""
        from research.telechat2.telechat_tokenizer import StreamDecoder

        decoder = StreamDecoder(self.tokenizer)
        on_token = None if on_text is None else lambda index: on_text(decoder.put(index))
        answer = self.generate([self.prompt_ids(Conversation(messages, None, self.prompt_format))], on_token)[
            0
        ]
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
        max_length: most tokens of prompt and answer together, by default and at most ``seq_length``.
        device_id: which NPU.
        batch_size: most prompts at once.
        use_past: predict with a cache.
        generation: arguments of ``generate``; None, or not there: as the YAML's model_config says.

    Raises:
        ValueError: a file is missing or does not fit the others; names and shapes are given.
    """
    config = read_config(Path(yaml_file))
    settings = dict(_section(config, "model", "model_config"), batch_size=batch_size)
    if not settings.keys() - {"batch_size"}:
        raise ValueError(f"{yaml_file} has no section model.model_config; use a predict YAML.")
    if use_past is not None:
        settings["use_past"] = use_past
    vocab_file = vocab_file or _section(config, "processor", "tokenizer").get("vocab_file")
    checkpoint = checkpoint or config.get("load_checkpoint")
    _check_files(yaml_file, vocab_file, checkpoint)
    prompt_format = prompt_format or telechat_prompt_format.find(checkpoint) or "chat"
    from research.telechat2.telechat_tokenizer import TelechatTokenizer

    tokenizer = TelechatTokenizer(str(vocab_file))
    model = _build_model(_section(config, "context"), settings, device_id)
    _check_vocabulary(tokenizer, vocab_file, model.config.vocab_size)
    seq_length = model.config.seq_length
    if max_length is not None and max_length > seq_length:
        raise ValueError(
            f"max_length is {max_length}, but the YAML's seq_length is {seq_length}; lower it, or raise "
            f"seq_length in the YAML."
        )
    load_weights(model, checkpoint)
    given = {name: value for name, value in (generation or {}).items() if value is not None}
    return Predictor(
        model, tokenizer, prompt_format, max_length or seq_length, {"max_new_tokens": MAX_NEW_TOKENS} | given
    )


def _section(config: dict, *names: str) -> dict:
    """A section of a YAML, empty where it is not there."""
    for name in names:
        config = config.get(name) or {}
    return config


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

    target = context.get("device_target", "Ascend")
    try:
        ms.set_context(
            mode=ms.GRAPH_MODE, device_target=target, device_id=device_id,
            jit_config={"jit_level": (context.get("jit_config") or {}).get("jit_level", "O0")},
        )  # fmt: skip
    except RuntimeError as error:
        raise ValueError(
            f"context.device_target is {target}, but MindSpore cannot use it here: "
            f"{str(error).strip().splitlines()[0]} Use a YAML for CPUs, or a machine with NPUs."
        ) from error
    if target == "Ascend":
        ms.set_context(max_device_memory=context.get("max_device_memory", "58GB"))
    from mindspore.nn.utils import no_init_parameters

    from research.telechat2.telechat import TelechatForCausalLM
    from research.telechat2.telechat_compat import is_cpu
    from research.telechat2.telechat_config import TelechatConfig

    with no_init_parameters():
        model = TelechatForCausalLM(TelechatConfig(**settings))
    model.set_train(False)
    if is_cpu():
        model.get_logits_warper = _in_numpy(model.get_logits_warper)
    return model


def _in_numpy(get_logits_warper):
    """Let MindFormers choose among the likeliest tokens in NumPy: MindSpore's top-k has no CPU kernel."""

    def get(generation_config):
        warpers = get_logits_warper(generation_config)
        for warper in (warpers, *warpers):
            warper.use_numpy = True
        return warpers

    return get


def load_weights(model, checkpoint: str | Path) -> None:
    """Load every weight of ``model`` from a MindSpore checkpoint, one in memory at a time.

    Raises:
        ValueError: the checkpoint is broken, or its names or shapes are not the model's.
    """
    from mindspore import Tensor

    from research.telechat2.checkpoint import read_mindspore_tensors

    wanted = {name: p for name, p in model.parameters_and_names() if not name.endswith("_cache")}
    problems = []
    for name, array in _naming_torch(read_mindspore_tensors(checkpoint), checkpoint):
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


def _naming_torch(tensors, checkpoint: str | Path):
    """Pass ``tensors`` on; if reading them fails, say so where the reason is that they are torch weights."""
    try:
        yield from tensors
    except ValueError as error:
        from research.telechat2.checkpoint.sources import read_mindspore_source

        if any(
            tensor.name.startswith("transformer.h.") for tensor in read_mindspore_source(Path(checkpoint))
        ):
            raise ValueError(
                f"{checkpoint} holds torch weights; convert them first with "
                f"research/telechat2/convert_weight.py, and give what it writes."
            ) from error
        raise


def question(text: str, system: str | None = None) -> Conversation:
    """A conversation of one question, after a system message if there is one."""
    return Conversation([*_system(system), {"role": "user", "content": text}], None, "chat")


def _system(system: str | None) -> list[dict]:
    return [{"role": "system", "content": system}] if system else []


def read_questions(path: str | Path, system: str | None = None) -> list[Conversation]:
    """Conversations that wait for an answer: a question on each line, or ``.jsonl`` lines of training data.

    Of a jsonl conversation the last answer is cut off. ``system`` is put before those without one.

    Raises:
        ValueError: an empty file, or a line that is no conversation (file and line are named).
    """
    questions = []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        if Path(path).suffix != ".jsonl":
            questions.append(question(line.rstrip("\r\n"), system))
            continue
        with naming(path, number):
            asked = parse_line(line)
            asked.render()  # checks the messages
        messages = asked.messages
        if messages[-1]["role"] in ("assistant", "bot"):
            messages = messages[:-1]
        if messages and messages[0]["role"] != "system":
            messages = [*_system(system), *messages]
        questions.append(asked._replace(messages=messages))
    if not questions:
        raise ValueError(f"{path} holds no question.")
    return questions


def answer_all(predictor: Predictor, questions: list[Conversation], batch_size: int) -> None:
    """Answer conversations in batches, and print each with its question.

    Raises:
        ValueError: one cannot be asked (its number is given); nothing is answered then.
    """
    prompts = []
    for number, asked in enumerate(questions, 1):
        try:
            prompts.append(predictor.prompt_ids(asked))
            predictor.check(prompts[-1:])
        except ValueError as error:
            raise ValueError(f"question {number} of {len(questions)}: {error}") from error
    batches = [slice(start, start + batch_size) for start in range(0, len(prompts), batch_size)]
    for batch in batches:
        predictor.check(prompts[batch])
    for batch in batches:
        answers = predictor.generate(prompts[batch])
        for asked, answer in zip(questions[batch], answers, strict=True):
            print(f"{asked.messages[-1]['content']}\n{answer.text}\n", flush=True)
            if answer.cut or len(answers) == 1:
                print(answer, file=sys.stderr)
        if len(answers) > 1:
            tokens = sum(len(answer.ids) for answer in answers)
            print(f"[{len(answers)} answers, {tokens} tokens, {answers[0].seconds:.2f} s]", file=sys.stderr)


def chat(predictor: Predictor, system: str | None, lines) -> None:
    """Answer every line of ``lines`` in one conversation, streaming; ``/new`` starts another."""
    start = _system(system)
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
        if predictor.fits(predictor.prompt_ids(Conversation(messages, None, predictor.prompt_format))):
            return
        del messages[keep : keep + 2]
        print(
            "(the conversation grew too long: its oldest question and answer are forgotten)", file=sys.stderr
        )
