"""What the prediction scripts share: loading a model, and asking it for the next answer."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from research.telechat2 import telechat_prompt_format
from research.telechat2.checkpoint.relatives.stated import settle_with
from research.telechat2.config.optimization import check_seed
from research.telechat2.config.preflight import check_settings
from research.telechat2.data.formats import Conversation
from research.telechat2.data.same_vocabulary import check_answering_vocabulary
from research.telechat2.generation.answer import STOPPED, Answer, Clock, Stopped
from research.telechat2.generation.padding import Rows
from research.telechat2.telechat_chat import encode, render
from research.telechat2.telechat_pool import check_pool
from research.telechat2.telechat_predict_group import Group
from research.telechat2.telechat_predict_plan import PARALLEL_MODEL, prediction_plan, processes_of_run
from research.telechat2.telechat_rope_requests import limits_of_rows
from research.telechat2.telechat_run_config import did_you_mean, read_config
from research.telechat2.telechat_run_keys import moe_section
from research.telechat2.telechat_sampling_rules import SAMPLING, check_sampling
from research.telechat2.text.messages import check_question

GENERATION = (*SAMPLING, "max_new_tokens", "min_length", "min_new_tokens")


@dataclass
class Predictor:
    """A model with its tokenizer and the prompt format it was tuned with.

    ``max_length``: most tokens of prompt and answer together, at most the model's ``seq_length``.
    ``limited_by``: the setting that ``max_length`` comes from, for messages.
    ``generation``: arguments of ``generate``; what is not there is as the model's config says.
    ``group``: the processes that share the model; each calls the same methods with the same arguments.
    ``checkpoint``: where the weights come from, for messages.
    """

    model: object
    tokenizer: object
    prompt_format: str
    max_length: int
    limited_by: str = "--max_length"
    generation: dict = field(default_factory=dict)
    group: Group = field(default_factory=Group)
    checkpoint: str = ""

    def prompt_ids(self, conversation: Conversation) -> list[int]:
        """The ids that ask for the next answer of a conversation."""
        check_question(conversation.messages)
        segments = render(
            conversation.messages, conversation.tools, prompt_format=self.prompt_format,
            add_generation_prompt=True, tool_tags_in_content=conversation.tool_tags_in_content,
        )  # fmt: skip
        return encode(segments, self.tokenizer)[0]

    def fits(self, prompt: list[int]) -> bool:
        """Whether a prompt leaves room for a token of answer, and the cache has room for both."""
        try:
            self.check([prompt])
        except ValueError:
            return False
        return True

    def check(self, prompts: list[list[int]]) -> None:
        """ValueError if a prompt leaves no room for an answer, or the cache has none for the batch."""
        for ids in prompts:
            check_length(len(ids), self.max_length, self.limited_by)
        config = self.model.config
        if config.use_past:
            lengths = [len(ids) for ids in prompts]
            check_pool(config, limits_of_rows(config, lengths, self._room_of_all(prompts), self.max_length))

    def _room(self, ids: list[int]) -> int:
        """Most tokens that an answer to ``ids`` may have."""
        room = self.max_length - len(ids)
        return min(self.generation.get("max_new_tokens", room), room)

    def _room_of_all(self, prompts: list[list[int]]) -> int:
        """The one limit that ``generate`` has for all rows: the largest.

        What a longer prompt may not use of it takes blocks all the same, and is taken off the answer.
        """
        return max(self._room(ids) for ids in prompts)

    def _cut(self, ids: list[int], answer: list[int]) -> str:
        """The setting that ended ``answer``, or "" if the model did."""
        if answer[-1] == self.model.config.eos_token_id:
            return ""
        return self.limited_by if len(ids) + len(answer) == self.max_length else "--max_new_tokens"

    def generate(
        self,
        prompts: list[list[int]],
        on_token: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Answer]:
        """Answer a batch of prompts given as ids, each as if asked alone.

        ``on_token(id)`` hears every token of a single prompt; ``stop()`` is asked after each of them whether
        its answer ends there. Raises ValueError as ``check`` does, or if logits are no numbers.
        """
        self.check(prompts)
        single = len(prompts) == 1
        clock = Clock(on_token if single else None, stop if single else None)
        padding = self.tokenizer.pad_token_id
        settings = self.generation | {"max_new_tokens": self._room_of_all(prompts), "pad_token_id": padding}
        if not self.model.config.extend_by_prompt:
            settings["longest"] = [len(ids) + self._room(ids) for ids in prompts]
        try:
            outputs = self.model.generate(Rows(prompts), streamer=clock, **settings)
        except Stopped:
            return [self._answer(clock.tokens, STOPPED, clock)]
        answers = []
        for prompt, output in zip(prompts, outputs, strict=True):
            ids = output[len(prompt) : len(prompt) + self._room(prompt)].tolist()
            answers.append(self._answer(ids, self._cut(prompt, ids), clock))
        return answers

    def _answer(self, ids: list[int], cut: str, clock: "Clock") -> Answer:
        """The answer of ``ids``, which ends before a character of which tokens are missing."""
        from research.telechat2.telechat_tokenizer import StreamDecoder

        decoder = StreamDecoder(self.tokenizer)
        text = "".join(map(decoder.put, ids)) + ("" if cut else decoder.end())
        return Answer(text, ids, cut, clock.total(), clock.first())

    def ask(
        self,
        messages: list[dict],
        on_text: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answer a conversation; ``on_text(str)`` hears the answer as it grows, in whole characters.

        ``stop()`` as in ``generate``.
        """
        from research.telechat2.telechat_tokenizer import StreamDecoder

        decoder = StreamDecoder(self.tokenizer)
        on_token = None if on_text is None else lambda index: on_text(decoder.put(index))
        prompt = self.prompt_ids(Conversation(messages, None, self.prompt_format))
        (answer,) = self.generate([prompt], on_token, stop)
        if on_text is not None and not answer.cut:
            on_text(decoder.end())
        return answer


def check_length(tokens: int, max_length: int, limited_by: str) -> None:
    """ValueError if a prompt of ``tokens`` tokens leaves no room for an answer."""
    if tokens >= max_length:
        raise ValueError(
            f"the prompt has {tokens} tokens, but prompt and answer together may have {max_length} "
            f"({limited_by}); shorten the prompt or raise that."
        )


def length_of_config(max_decode_length: int, seq_length: int) -> tuple[int, str]:
    """Most tokens of prompt and answer together by a model's config, and the field that says so."""
    limits = ((seq_length, "the YAML's seq_length"), (max_decode_length, "the YAML's max_decode_length"))
    return min(limits, key=lambda limit: limit[0])


def load_predictor(
    yaml_file: str | Path,
    vocab_file: str | Path | None = None,
    checkpoint: str | Path | None = None,
    *,
    prompt_format: str | None = None,
    max_length: int | None = None,
    device_id: int | None = None,
    batch_size: int = 1,
    use_past: bool | None = None,
    use_parallel: bool | None = None,
    generation: dict | None = None,
    seed: int | None = None,
) -> Predictor:
    """Build the model of a predict YAML and load its weights, all of them or none.

    Args:
        yaml_file: a predict YAML. The next three default to what it says.
        vocab_file: tokenizer.model; if the YAML names none either, that beside the weights.
        checkpoint: an HF folder, a converted checkpoint, or the `checkpoint` folder of a training run.
        prompt_format: "chat", "plain" or "v1"; by default the one recorded with the checkpoint, else that of
            the release whose vocabulary it is.
            Which it is and why is printed on standard error.
        max_length: most tokens of prompt and answer together, at most ``seq_length``; by default that if
            ``generation`` has ``max_new_tokens``, else the YAML's ``max_decode_length``.
        device_id: which NPU; by default the YAML's.
        batch_size: most prompts at once.
        use_past: predict with a cache.
        use_parallel: share the model with the other processes that scripts/msrun_launcher.sh has started;
            by default the YAML's.
        generation: arguments of ``generate``, of GENERATION; None, or not there: as the YAML's model_config
            says.
        seed: of sampling; by default the YAML's.

    Raises:
        ValueError: a file is missing or does not fit the others; names and shapes are given. Or a setting
            of sampling is none.
    """
    check_generation(generation or {})
    _check_arguments(prompt_format, max_length, seed)
    config = read_config(Path(yaml_file))
    for note in check_settings(config, source=yaml_file):
        print(f"note: {note}", file=sys.stderr)
    if not _section(config, "model", "model_config"):
        raise ValueError(f"{yaml_file} has no section model.model_config; use a predict YAML.")
    if use_past is not None:
        config["model"]["model_config"]["use_past"] = use_past
    if use_parallel is not None:
        config["use_parallel"] = use_parallel
    named = (
        "--vocab_file_path" if vocab_file else f"{yaml_file}: processor.tokenizer.vocab_file",
        "--checkpoint_path" if checkpoint else f"{yaml_file}: load_checkpoint",
    )
    checkpoint = checkpoint or config.get("load_checkpoint")
    vocab_file = vocab_file or _section(config, "processor", "tokenizer").get("vocab_file")
    vocab_file = vocab_file or _vocab_file_beside(checkpoint)
    _check_files(yaml_file, vocab_file, checkpoint, named)
    check_answering_vocabulary(vocab_file, checkpoint)
    moe = config.get("moe_config")
    taken = settle_with(config["model"]["model_config"], checkpoint, str(yaml_file), moe)
    settings = config["model"]["model_config"] | {"batch_size": batch_size, "moe_config": moe_section(config)}
    if plan := prediction_plan(config, processes_of_run()):
        settings["parallel_config"] = plan
    from mindspore import set_seed

    from research.telechat2.telechat_tokenizer import TelechatTokenizer

    tokenizer = TelechatTokenizer(str(vocab_file))
    prompt_format, chosen = choose_prompt_format(prompt_format, checkpoint, tokenizer)
    parallel = plan is not None or _section(config, "model", "arch").get("type") == PARALLEL_MODEL
    _set_context(_section(config, "context"), device_id)
    model_config = _model_config(settings)
    check_vocabulary(tokenizer, vocab_file, vars(model_config))
    given = {name: value for name, value in (generation or {}).items() if value is not None}
    limit = _length_limit(model_config, max_length, given)
    if processes_of_run() > 1:
        _meet(model_config, checkpoint)
    model = _build_model(model_config, parallel)
    load_weights(model, checkpoint)
    group = Group(model.ranks if parallel else None)
    seed = config.get("seed") if seed is None else seed
    if seed is not None or plan:
        set_seed(group.seed if seed is None else seed)
    for line in [*(f"model_config: {line}" for line in taken), f"prompt format: {prompt_format} ({chosen})"]:
        print(line, file=sys.stderr)
    return Predictor(model, tokenizer, prompt_format, *limit, given, group, str(checkpoint))


def _check_arguments(prompt_format: str | None, max_length: int | None, seed: int | None) -> None:
    """ValueError if an argument of ``load_predictor`` is none, before anything is read."""
    check_seed(seed)
    if prompt_format is not None:
        telechat_prompt_format.check(prompt_format)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be at least 1.")


def check_generation(given: dict) -> None:
    """ValueError if an argument of ``generate`` is misspelt, or none."""
    for name in given:
        if name not in GENERATION:
            raise ValueError(f"{name} is no setting of an answer. {did_you_mean(name, list(GENERATION))}")
    check_sampling(given)
    if (tokens := given.get("max_new_tokens")) is not None and tokens < 1:
        raise ValueError(f"max_new_tokens is {tokens}; it must be at least 1.")


def _vocab_file_beside(checkpoint) -> Path | None:
    """The tokenizer.model of a folder of weights, as Hugging Face's have one."""
    if not checkpoint:
        return None
    path = Path(checkpoint)
    found = (path if path.is_dir() else path.parent) / "tokenizer.model"
    if not found.is_file():
        return None
    print(f"vocabulary: {found}", file=sys.stderr)
    return found


def _length_limit(config, max_length: int | None, generation: dict) -> tuple[int, str]:
    """Most tokens of prompt and answer together, and the setting that says so."""
    if max_length is None:
        own = config.seq_length if "max_new_tokens" in generation else config.max_decode_length
        return length_of_config(own, config.seq_length)
    if max_length > config.seq_length:
        raise ValueError(
            f"max_length is {max_length}, but the YAML's seq_length is {config.seq_length}; lower it, or "
            f"raise seq_length in the YAML."
        )
    return max_length, "--max_length"


def choose_prompt_format(given: str | None, checkpoint, tokenizer) -> tuple[str, str]:
    """The prompt format to use, and why: by default that of the release which the vocabulary is of."""
    if given:
        return given, "as asked for"
    record = telechat_prompt_format.record_of(checkpoint)
    if record is not None:
        return telechat_prompt_format.find(checkpoint), f"recorded in {record}"
    reason = f"none is recorded with {checkpoint}: give --prompt_format plain if it was tuned in that"
    if tokenizer.release_format != "chat":
        reason = f"the vocabulary is that of TeleChat v1; {reason}"
    return tokenizer.release_format, reason


def _section(config: dict, *names: str) -> dict:
    """A section of a YAML, empty where it is not there."""
    for name in names:
        config = config.get(name) or {}
    return config


def _check_files(yaml_file, vocab_file, checkpoint, named: tuple[str, str]) -> None:
    """Refuse what is missing before the slow imports; ``named``: what names the two paths."""
    if not vocab_file:
        raise ValueError(f"{yaml_file} names no vocab_file; give --vocab_file_path tokenizer.model.")
    if not checkpoint:
        raise ValueError(
            f"{yaml_file} names no load_checkpoint; give --checkpoint_path, or the answers are noise."
        )
    for name, path in zip(named, (vocab_file, checkpoint), strict=True):
        if not Path(path).exists():
            raise ValueError(f"{name} {path} does not exist.")


def check_vocabulary(tokenizer, vocab_file, settings: dict) -> None:
    """ValueError if a vocabulary and the ``model_config`` settings of a model do not go together."""
    if tokenizer.vocab_size > settings["vocab_size"]:
        raise ValueError(
            f"{vocab_file} has {tokenizer.vocab_size} tokens, but the YAML's vocab_size is "
            f"{settings['vocab_size']}; this is another model's vocabulary."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found, expected = getattr(tokenizer, name), settings[name]
        if found != expected and (name, expected) != ("pad_token_id", -1):
            raise ValueError(
                f"the model's {name} is {expected}, but in {vocab_file} it is {found}; correct it in the "
                "YAML's model_config or the config.json beside the weights, whichever states it, or use the "
                "vocabulary of this model."
            )


def _model_config(settings: dict):
    from research.telechat2.telechat_config import TelechatConfig

    return TelechatConfig(**settings)


def _meet(config, checkpoint: str | Path) -> None:
    """Meet the other processes when nothing more can be found wrong: they would wait for one that ends."""
    from research.telechat2.checkpoint.loading import sizes_of_model
    from research.telechat2.checkpoint.rank_layout import weights_of_rank
    from research.telechat2.telechat_compat import join_processes

    weights_of_rank(
        checkpoint, sizes_of_model(config), tensor_parallel=config.parallel_config.model_parallel, rank=0,
        qkv_concat=config.qkv_concat,
    )  # fmt: skip
    join_processes()


def _build_model(config, parallel: bool):
    """The model, or this process's part of it, without weights."""
    from mindspore.nn.utils import no_init_parameters

    from research.telechat2.infer.telechat import ParallelTelechatForCausalLM
    from research.telechat2.telechat import TelechatForCausalLM

    with no_init_parameters():
        model = (ParallelTelechatForCausalLM if parallel else TelechatForCausalLM)(config)
    return model.set_train(False)


def _set_context(context: dict, device_id: int | None) -> None:
    """Choose target, device and graph compiler as MindFormers does for a prediction."""
    import mindspore as ms

    from research.telechat2.telechat_compat import naming_target

    target = context.get("device_target", "Ascend")
    if processes_of_run() > 1:
        device_id = int(os.environ.get("DEVICE_ID", 0))  # msrun numbers the workers of a machine
    elif device_id is None:
        device_id = context.get("device_id", 0)
    jit = {"jit_level": context.get("jit_level", "O0"), "infer_boost": context.get("infer_boost", "on")}
    jit |= {name: value for name, value in (context.get("jit_config") or {}).items() if value}
    if jit["jit_level"] == "O1":
        raise ValueError("context.jit_config.jit_level is O1, which prediction does not support; use O0.")
    with naming_target(target):
        ms.set_context(mode=ms.GRAPH_MODE, device_target=target, device_id=device_id, jit_config=jit)
    if target == "Ascend":
        ms.set_context(max_device_memory=context.get("max_device_memory", "58GB"))


def load_weights(model, checkpoint: str | Path) -> None:
    """Load every weight of ``model`` from a checkpoint of any layout, one in memory at a time.

    It may be an HF folder of a TeleChat model. Names and shapes are compared before the first is loaded. A
    process that shares the model reads its part alone.

    Raises:
        ValueError: the checkpoint is broken, or its names or shapes are not the model's.
    """
    if hasattr(model, "load_weights"):
        model.load_weights(checkpoint)
        return
    from research.telechat2.checkpoint.loading import load_tensors, sizes_of_model
    from research.telechat2.checkpoint.rank_layout import whole_weights

    _, tensors = whole_weights(checkpoint, sizes_of_model(model.config))
    load_tensors(model, tensors, str(checkpoint))
