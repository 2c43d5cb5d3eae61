"""A loaded model that answers prompts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from research.telechat2.common.errors import UsageError
from research.telechat2.config.generation_limits import GenerationLimits
from research.telechat2.data.conversions import Conversation
from research.telechat2.generation.answer import STOPPED, Answer, Clock, Stopped
from research.telechat2.generation.padding import Rows
from research.telechat2.infer.process_group import Group
from research.telechat2.text.chat import encode, render
from research.telechat2.text.messages import check_question


@dataclass
class Predictor:
    """A model with its tokenizer and the prompt format it was tuned with.

    ``limits``: lengths of prompt and answer.
    ``generation``: further arguments of ``generate``; the model's config has the rest.
    ``group``: the processes that share the model; each calls the same methods with the same arguments.
    ``checkpoint``: where the weights come from, for messages.
    """

    model: object
    tokenizer: object
    prompt_format: str
    limits: GenerationLimits
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
        return encode(segments, self.tokenizer.vocabulary)[0]

    def fits(self, prompt: list[int]) -> bool:
        """Whether a prompt leaves room for a token of answer, and the cache has room for both."""
        try:
            self.check([prompt])
        except UsageError:
            return False
        return True

    def check(self, prompts: list[list[int]]) -> None:
        """UsageError if a prompt leaves no room for an answer, or the cache has none for the batch."""
        lengths = [len(ids) for ids in prompts]
        for length in lengths:
            self.limits.check_prompt(length)
        limits = GenerationLimits.of(self.model.config, max_new_tokens=self._room_of_all(lengths))
        limits.check_cache(lengths)

    def _room_of_all(self, lengths: Iterable[int]) -> int:
        """The one limit that ``generate`` has for all rows: the largest.

        What a longer prompt may not use of it takes blocks all the same, and is taken off the answer.
        """
        return max(map(self.limits.room, lengths))

    def _cut(self, ids: list[int], answer: list[int]) -> str:
        """The setting that ended ``answer``, or "" if the model did."""
        if answer[-1] == self.model.config.eos_token_id:
            return ""
        reached = len(ids) + len(answer) == self.limits.max_length
        return self.limits.source if reached else "--max_new_tokens"

    def generate(
        self,
        prompts: list[list[int]],
        on_token: Callable[[int], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> list[Answer]:
        """Answer a batch of prompts given as ids, each as if asked alone.

        ``on_token(id)`` gets every token of a single prompt; after each of them ``stop()`` returns whether
        its answer ends there. Raises UsageError as ``check`` does, or if logits are NaN or infinite.
        """
        self.check(prompts)
        single = len(prompts) == 1
        clock = Clock(on_token if single else None, stop if single else None)
        padding = self.tokenizer.pad_token_id
        lengths = [len(ids) for ids in prompts]
        settings = self.generation | {"max_new_tokens": self._room_of_all(lengths), "pad_token_id": padding}
        if not self.model.config.extend_by_prompt:
            settings["longest"] = [self.limits.end(length) for length in lengths]
        try:
            outputs = self.model.generate(Rows(prompts), streamer=clock, **settings)
        except Stopped:
            return [self._answer(clock.tokens, STOPPED, clock)]
        answers = []
        for prompt, output in zip(prompts, outputs, strict=True):
            ids = output[len(prompt) : self.limits.end(len(prompt))].tolist()
            answers.append(self._answer(ids, self._cut(prompt, ids), clock))
        return answers

    def _answer(self, ids: list[int], cut: str, clock: "Clock") -> Answer:
        """The answer of ``ids``, which ends before a character of which tokens are missing."""
        from research.telechat2.text.stream_decoder import StreamDecoder

        decoder = StreamDecoder(self.tokenizer.vocabulary)
        text = "".join(map(decoder.put, ids)) + ("" if cut else decoder.end())
        return Answer(text, ids, cut, clock.total(), clock.first())

    def ask(
        self,
        messages: list[dict],
        on_text: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answer a conversation; ``on_text(str)`` gets the answer as it grows, in whole characters.

        ``stop()`` as in ``generate``.
        """
        from research.telechat2.text.stream_decoder import StreamDecoder

        decoder = StreamDecoder(self.tokenizer.vocabulary)
        on_token = None if on_text is None else lambda index: on_text(decoder.put(index))
        prompt = self.prompt_ids(Conversation(messages, None, self.prompt_format))
        (answer,) = self.generate([prompt], on_token, stop)
        if on_text is not None and not answer.cut:
            on_text(decoder.end())
        return answer
