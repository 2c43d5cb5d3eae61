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
from research.telechat2.text.stream_decoder import StreamDecoder


@dataclass
class Predictor:
    """A model with its tokenizer and the prompt format it was tuned with.

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
        """The one limit that ``generate`` has for all rows; what is too much for a row is taken off later."""
        return max(map(self.limits.room, lengths))

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
        ends = [self.limits.end(len(ids)) for ids in prompts]
        settings = self.generation | {"pad_token_id": self.tokenizer.pad_token_id}
        settings["max_new_tokens"] = self._room_of_all(map(len, prompts))
        if not self.model.config.extend_by_prompt:
            settings["longest"] = ends
        try:
            outputs = self.model.generate(Rows(prompts), streamer=clock, **settings)
        except Stopped:
            return [self._answer(clock.tokens, STOPPED, clock)]
        answers = []
        for prompt, output, end in zip(prompts, outputs, ends, strict=True):
            ids, cut = output[len(prompt) : end].tolist(), ""
            if ids[-1] != self.model.config.eos_token_id:
                reached = len(prompt) + len(ids) == self.limits.max_length
                cut = self.limits.source if reached else "--max_new_tokens"
            answers.append(self._answer(ids, cut, clock))
        return answers

    def _answer(self, ids: list[int], cut: str, clock: Clock) -> Answer:
        """The answer of ``ids``, which ends before a character of which tokens are missing."""
        decoder = StreamDecoder(self.tokenizer.vocabulary)
        text = "".join(map(decoder.put, ids)) + ("" if cut else decoder.end())
        return Answer(text, ids, cut, clock.total(), clock.first())

    def ask(
        self,
        messages: list[dict],
        on_text: Callable[[str], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> Answer:
        """Answer a conversation; ``on_text(str)`` gets the answer as it grows, in whole characters."""
        decoder = StreamDecoder(self.tokenizer.vocabulary)
        on_token = None if on_text is None else lambda index: on_text(decoder.put(index))
        prompt = self.prompt_ids(Conversation(messages, None, self.prompt_format))
        (answer,) = self.generate([prompt], on_token, stop)
        if on_text is not None and not answer.cut:
            on_text(decoder.end())
        return answer
