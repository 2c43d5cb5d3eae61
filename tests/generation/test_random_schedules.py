"""Any schedule of an engine gives every request the tokens of its own single run, and of the oracle."""

import copy

import numpy as np
import pytest
import torch
from model_fixtures import RandomModel, prompts
from paged_engine import Engine, Request
from rope_oracle import with_dynamic_ntk

from research.telechat2.infer.telechat import ParallelTelechatForCausalLM

VOCAB, SEQ_LENGTH, TRAINED, BLOCK_SIZE, NUM_BLOCKS = 256, 64, 24, 4, 24
CACHE = {"use_past": True, "seq_length": SEQ_LENGTH, "block_size": BLOCK_SIZE, "num_blocks": NUM_BLOCKS}
NTK = {"extend_method": "DYNAMIC_NTK", "max_position_embedding": TRAINED}
MOE = {"n_layer": 1, "num_experts": 5, "num_experts_per_tok": 2}
# sizes, fields of the configuration
KINDS = {
    "gqa": ({"n_layer": 2}, {"qkv_concat": True}),
    "moe": (MOE, {}),
    "ntk": ({"n_layer": 2}, NTK),
}


class Served:
    """A random model of a kind, as ours and as the oracle."""

    def __init__(self, folder, kind: str):
        sizes, fields = KINDS[kind]
        self.random = RandomModel(
            folder, seed=21, hidden_size=128, n_head=4, num_key_value_heads=2, ffn_hidden_size=96,
            vocab_size=VOCAB, **sizes,
        )  # fmt: skip
        model = ParallelTelechatForCausalLM(self.random.config(**CACHE, **fields))
        model.load_weights(self.random.hf)
        self.model, self.extends = model.set_train(False), fields is NTK
        self.cheap_oracle = kind != "moe"

    def request(self, prompt: list[int], new_tokens: int, told: bool = True) -> Request:
        """A request that might go on to the next multiple of 16 tokens, if its engine is told so."""
        limit = -(-(len(prompt) + new_tokens) // 16) * 16
        return Request(prompt, new_tokens, limit if told and self.extends else None)

    def requests(self, seed: int, count: int, told: bool) -> list[Request]:
        """Prompts and answers of random lengths; some begin as others do."""
        rng = np.random.default_rng(seed)
        begins = prompts(seed, VOCAB, 9, 14, 22)
        found = []
        for _ in range(count):
            length = rng.integers(1, 40) if rng.random() < 0.2 else rng.integers(1, 16)
            begin = begins[rng.integers(3)] if rng.random() < 0.4 else []
            new_tokens = int(rng.integers(1, 11))
            prompt = (
                begin + rng.integers(4, VOCAB, min(length, SEQ_LENGTH - new_tokens - len(begin))).tolist()
            )
            found.append(self.request(prompt, new_tokens, told))
        return found

    def same_factor(self, a: Request, b: Request) -> bool:
        """Requests that share blocks have one rotary factor."""
        return not self.extends or self.reach(a) == self.reach(b)

    def reach(self, request: Request) -> int:
        """The length whose factor a request has: as told, or that of the blocks reserved for it."""
        longest = request.longest
        if longest is None:
            longest = -(-(len(request.prompt) + request.new_tokens - 1) // BLOCK_SIZE) * BLOCK_SIZE
        return max(longest, TRAINED)

    def oracles(self, request: Request) -> list[int]:
        """What the oracle would have answered; if that is what was answered, by induction its own run."""
        oracle = self.random.oracle
        if self.extends:
            oracle = with_dynamic_ntk(oracle, self.reach(request), TRAINED)
        with torch.no_grad():
            logits = oracle(torch.tensor([request.tokens])).logits[0].numpy()
        return request.prompt + logits[len(request.prompt) - 1 : -1].argmax(-1).tolist()


@pytest.fixture(scope="module", params=KINDS)
def served(request, tmp_path_factory):
    return Served(tmp_path_factory.mktemp(request.param), request.param)


def check(served: Served, seed: int, reserve: bool = False) -> None:
    """A schedule of 50 requests, which saw everything that can happen; with ``reserve`` no limit is told."""
    requests = served.requests(seed, 50, told=not reserve)
    expected = copy.deepcopy(requests)
    single = Engine(served.model, seed, reserve)
    for request in expected:
        single.alone(request)
    engine = Engine(served.model, seed, reserve, served.same_factor)
    engine.answer(requests)
    for request, own in zip(requests, expected, strict=True):
        assert request.finished and request.tokens == own.tokens
    for request in requests[:: 1 if served.cheap_oracle else 6]:
        assert request.tokens == served.oracles(request)
    assert len(engine.free) == NUM_BLOCKS and engine.times_given.min() > 5 and not engine.fewest_free
    assert min(engine.counts.values()) > 5, engine.counts


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 5))])
def test_every_request_gets_the_tokens_of_its_own_run(served, seed):
    """Prefills, pieces of prompts and decoding rows in any order; the pool is used to its last block."""
    check(served, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 11))
def test_blocks_reserved_for_a_whole_request(served, seed):
    """As MindIE gives them; Dynamic NTK has the factor of what they hold."""
    check(served, seed, reserve=True)


def test_a_shared_beginning_is_read_once(served):
    """By a request that goes on in the same step as its owner, and after the owner is gone."""
    begin, *ends = prompts(3, VOCAB, 18, 3, 9)
    first, second = served.request(begin + ends[0], 4), served.request(begin + ends[1], 5)
    expected = copy.deepcopy([first, second])
    engine = Engine(served.model, seed=0)
    for request in expected:
        engine.alone(request)
    engine.admit(first)
    engine.step([(first, 21)], prefill=True)
    engine.admit(second)
    assert second.read == 16 and second.blocks == first.blocks[:4]
    engine.step([(first, 22), (second, 27)], prefill=False)
    engine.step([(first, 23)], prefill=False)
    engine.step([(second, 28), (first, 24)], prefill=False)
    assert first.finished and first.tokens == expected[0].tokens
    assert engine.owners[second.blocks].tolist() == [1] * 7 and len(engine.free) == NUM_BLOCKS - 7
    while not second.finished:
        engine.step([(second, len(second.tokens))], prefill=False)
    assert second.tokens == expected[1].tokens == served.oracles(second)
