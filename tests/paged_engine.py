"""A serving engine with a random schedule: which requests a step reads, in which pieces, in which blocks.

Any order that a scheduler could choose: prompts whole or in pieces, pieces beside decoding rows, requests put
off and read anew, few blocks in scrambled order, shared where a live request has read the same tokens. Blocks
that nobody owns hold numbers which would drown every answer that read them.
"""

from dataclasses import dataclass, field

import numpy as np
from mindspore import Tensor

FOREIGN = (
    1e30  # in blocks without an owner; no NaN: the reference implementation multiplies what it masks by 0
)


@dataclass(eq=False)
class Request:
    """A prompt and the tokens after it, greedy; ``longest`` as RequestLengths says, None: not told."""

    prompt: list[int]
    new_tokens: int
    longest: int | None = None
    tokens: list[int] = field(init=False)  # of prompt and answer so far
    read: int = field(init=False, default=0)  # tokens whose keys are in the cache
    blocks: list[int] = field(init=False, default_factory=list)

    def __post_init__(self):
        self.tokens = list(self.prompt)

    @property
    def finished(self) -> bool:
        """Whether the answer is complete."""
        return len(self.tokens) == len(self.prompt) + self.new_tokens


class Engine:
    """Requests in the cache of ``model``, read and continued at random.

    Args:
        model: with a paged cache, any sizes in one graph.
        seed: of every choice.
        reserve: give a request all its blocks at once, instead of each when a token needs it.
        same_factor: whether two requests may share blocks.
    """

    def __init__(self, model, seed: int, reserve: bool = False, same_factor=lambda a, b: True):
        model.set_dynamic_inputs()
        self.model, self.rng = model, np.random.default_rng(seed)
        self.block_size, self.num_blocks = model.config.block_size, model.config.num_blocks
        self.reserve, self.same_factor = reserve, same_factor
        self.live: list[Request] = []
        self.put_off: list[Request] = []
        self.owners = np.zeros(self.num_blocks, int)
        self.times_given = np.zeros(self.num_blocks, int)
        self.fewest_free = self.num_blocks
        self.counts = dict.fromkeys(("steps", "mixed", "batched", "pieces", "shared", "put_off"), 0)
        self._forget(slice(None))

    @property
    def free(self) -> np.ndarray:
        """Blocks without an owner."""
        return np.flatnonzero(self.owners == 0)

    def answer(self, requests: list[Request]) -> None:
        """Bring all requests to their end."""
        waiting = list(requests)
        while waiting or self.live:
            while waiting and len(self.live) < 8 and self.rng.random() < 0.5:
                self.admit(waiting.pop(0))
            if self.live and self.rng.random() < 0.03:
                self._put_off(self.rng.choice(self.live))
            pieces, prefill = self._choose()
            if pieces:
                self.step(pieces, prefill)
            waiting += self.put_off
            self.put_off = []
            assert self.counts["steps"] < 100 * len(requests)

    def alone(self, request: Request) -> None:
        """Bring one request to its end: its prompt at once, then a token in each step."""
        self.admit(request)
        while not request.finished:
            self.step([(request, len(request.tokens))], prefill=request.read == 0)

    def admit(self, request: Request) -> None:
        """Take a request in, in the full blocks of its beginning that a live one has read."""
        self.live.append(request)
        self._share(request)
        if self.reserve and not self._provide(request, len(request.prompt) + request.new_tokens - 1, ()):
            self._put_off(request)

    def step(self, pieces: list[tuple[Request, int]], prefill: bool) -> None:
        """Read the tokens of each request up to a stop, and append the next where that is its newest."""
        rows, starts = [request for request, _ in pieces], [request.read for request, _ in pieces]
        assert all(self._provide(request, stop, rows) for request, stop in pieces)
        stops = np.array([stop for _, stop in pieces])
        padded = np.zeros((len(rows), stops.max()), np.int32)
        tables = np.full((len(rows), max(len(request.blocks) for request in rows)), -1, np.int32)
        slots = []
        for row, (request, stop) in enumerate(pieces):
            padded[row, :stop] = request.tokens[:stop]
            tables[row, : len(request.blocks)] = request.blocks
            at = np.arange(request.read, stop)
            slots.append(tables[row, at // self.block_size] * self.block_size + at % self.block_size)
        told = {} if rows[0].longest is None else {"longest": [request.longest for request in rows]}
        logits = self._logits(
            padded, prefill, valid_length_each_example=stops, block_tables=tables,
            slot_mapping=np.concatenate(slots), starts=None if prefill else np.array(starts), **told,
        )  # fmt: skip
        self._count(pieces, prefill)
        for (request, stop), row in zip(pieces, logits, strict=True):
            request.read = stop
            if stop == len(request.tokens):
                request.tokens.append(int(row.argmax()))
            if request.finished:
                self._give_back(request)

    def _logits(self, tokens, prefill: bool, **kwargs) -> np.ndarray:
        inputs = self.model.prepare_inputs_for_generation(tokens, prefill=prefill, **kwargs)
        inputs["batch_valid_length"] = Tensor(inputs["batch_valid_length"])
        self.model.phase = "prefill" if prefill else "increment"
        self.model.add_flags_custom(is_first_iteration=prefill)
        logits = self.model(**inputs).asnumpy()
        assert np.isfinite(logits).all()
        return logits

    def _choose(self) -> tuple[list[tuple[Request, int]], bool]:
        """Requests in any order, with the positions up to which they are read, and the graph that does it."""
        new = [request for request in self.live if request.read == 0]
        prefill = bool(new) and self.rng.random() < 0.5
        pieces, chosen = [], []
        for request in self.rng.permutation(new if prefill else self.live):
            if request not in self.live or pieces and self.rng.random() < 0.3:
                continue  # put off for another's sake, or left for a later step
            unread = len(request.tokens) - request.read
            count = unread if self.rng.random() < 0.5 else self.rng.integers(1, unread + 1)
            if self._provide(request, request.read + count, [*chosen, request]):
                pieces.append((request, request.read + int(count)))
                chosen.append(request)
        return pieces, prefill

    def _share(self, request: Request) -> None:
        """All of the longest beginning but its last token, of which the step needs the logits."""
        best = []
        for other in self.live:
            if other is request or not self.same_factor(request, other):
                continue
            common = 0
            for mine, its in zip(request.tokens[:-1], other.tokens[: other.read], strict=False):
                if mine != its:
                    break
                common += 1
            best = max(best, other.blocks[: common // self.block_size], key=len)
        request.blocks, request.read = list(best), len(best) * self.block_size
        self.owners[best] += 1
        self.counts["shared"] += len(best)

    def _provide(self, request: Request, stop: int, kept) -> bool:
        """Give blocks for the tokens up to ``stop``; others than ``kept`` are put off where none is free."""
        while len(request.blocks) * self.block_size < stop:
            if not len(self.free):
                victims = [other for other in self.live if other not in (*kept, request)]
                if self.reserve or not victims:
                    return False
                self._put_off(self.rng.choice(victims))
                continue
            block = int(self.rng.choice(self.free))
            self.owners[block] += 1
            self.times_given[block] += 1
            request.blocks.append(block)
            self.fewest_free = min(self.fewest_free, len(self.free))
        return True

    def _put_off(self, request: Request) -> None:
        """Take a request's blocks; its answer so far stays, and is read anew with the prompt."""
        self.counts["put_off"] += 1
        self.put_off.append(request)
        self._give_back(request)

    def _give_back(self, request: Request) -> None:
        self.live.remove(request)
        self.owners[request.blocks] -= 1
        self._forget([block for block in request.blocks if self.owners[block] == 0])
        request.blocks, request.read = [], 0

    def _forget(self, blocks) -> None:
        """Fill blocks of every cache with what no request wrote."""
        for cache in self.model.get_parameters():
            if cache.name.endswith("_cache"):
                values = cache.asnumpy().copy()
                by_block = values.reshape(-1, self.num_blocks + 1, self.block_size, values.shape[-1])
                by_block[:, : self.num_blocks][:, blocks] = FOREIGN
                cache.set_data(Tensor(values))

    def _count(self, pieces, prefill: bool) -> None:
        """What the schedule has seen, so that a test can tell that it saw all."""
        read = [stop - request.read for request, stop in pieces]
        self.counts["steps"] += 1
        self.counts["batched"] += len(pieces) > 1
        self.counts["pieces"] += sum(stop < len(request.tokens) for request, stop in pieces)
        self.counts["mixed"] += not prefill and min(read) == 1 < max(read)
