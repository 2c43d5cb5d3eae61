"""The paged cache, driven by hand: blocks in scrambled order, unequal lengths, slots that are not written."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from model_fixtures import RandomModel, int32

SEQ_LENGTH, BLOCK_SIZE, NUM_BLOCKS = 32, 4, 20
VOCAB = 256


class Pages:
    """Rows of tokens with blocks dealt out from a shuffled pool, one when it is needed, never in order."""

    def __init__(self, rows, seed: int):
        self.rows = [list(row) for row in rows]
        self.free = list(np.random.default_rng(seed).permutation(NUM_BLOCKS))
        self.tables = np.full((len(rows), SEQ_LENGTH // BLOCK_SIZE), -1, np.int32)

    def slot(self, row: int, position: int) -> int:
        block, offset = divmod(position, BLOCK_SIZE)
        if self.tables[row, block] < 0:
            self.tables[row, block] = self.free.pop()
        return int(self.tables[row, block]) * BLOCK_SIZE + offset

    def prefill_slots(self) -> np.ndarray:
        """Of every position of every row up to seq_length, -1 beyond its tokens."""
        slots = np.full((len(self.rows), SEQ_LENGTH), -1, np.int32)
        for row, tokens in enumerate(self.rows):
            slots[row, : len(tokens)] = [self.slot(row, position) for position in range(len(tokens))]
        return slots.reshape(-1)

    def decode_slots(self) -> np.ndarray:
        return np.array([self.slot(row, len(tokens) - 1) for row, tokens in enumerate(self.rows)])


def step(model, pages: Pages, prefill: bool, slots=None) -> np.ndarray:
    """Logits ``[B, V]`` of each row's last token."""
    padded = np.zeros((len(pages.rows), SEQ_LENGTH), np.int32)
    for row, tokens in enumerate(pages.rows):
        padded[row, : len(tokens)] = tokens
    if slots is None:
        slots = pages.prefill_slots() if prefill else pages.decode_slots()
    inputs = model.prepare_inputs_for_generation(
        padded,
        prefill=prefill,
        valid_length_each_example=np.array([len(tokens) for tokens in pages.rows]),
        block_tables=pages.tables,
        slot_mapping=slots,
    )
    inputs["batch_valid_length"] = Tensor(inputs["batch_valid_length"])
    model.phase = "prefill" if prefill else "increment"  # as generate does: one compiled graph for each
    model.add_flags_custom(is_first_iteration=prefill)
    return model(**inputs).asnumpy()


def fill_caches(model, value: float) -> None:
    for cache in caches(model):
        cache.set_data(Tensor(np.full(cache.shape, value, np.float32)))


def caches(model) -> list[ms.Parameter]:
    found = [p for p in model.get_parameters() if p.name.endswith("_cache")]
    assert len(found) == 4  # keys and values of two layers
    return found


def written_slots(model, before: list[np.ndarray], kv_heads: int) -> list[set[int]]:
    """For each cache the slots whose content differs, the spare block that takes padding left out."""
    found = []
    for cache, old in zip(caches(model), before, strict=True):
        differs = (cache.asnumpy() != old).any(-1).reshape(kv_heads, -1)[:, : NUM_BLOCKS * BLOCK_SIZE]
        assert (differs == differs[0]).all()  # a token's slot is written for every head
        found.append(set(np.flatnonzero(differs[0])))
    return found


# heads, head_dim, and what else config.json says
CASES = {
    "mha": (2, 64, {}),
    "gqa": (4, 64, {"num_key_value_heads": 2}),
    "mqa": (2, 160, {"num_key_value_heads": 1}),
    "moe": (4, 64, {"num_key_value_heads": 2, "num_experts": 5, "num_experts_per_tok": 2, "tied": True}),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def random(request, tmp_path_factory):
    heads, head_dim, more = request.param
    return RandomModel(
        tmp_path_factory.mktemp("model"), seed=11, hidden_size=heads * head_dim, n_head=heads, n_layer=2,
        ffn_hidden_size=192, vocab_size=VOCAB, **more,
    )  # fmt: skip


def build_paged(random, is_dynamic):
    model = random.build(
        seq_length=SEQ_LENGTH, use_past=True, is_dynamic=is_dynamic,
        block_size=BLOCK_SIZE, num_blocks=NUM_BLOCKS,
    )  # fmt: skip
    if is_dynamic:
        model.set_dynamic_inputs()
    return model


@pytest.fixture(scope="module", params=[True, False], ids=["dynamic", "fixed"])
def paged(request, random):
    return build_paged(random, request.param)


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    return np.random.default_rng(12).integers(4, VOCAB, (3, SEQ_LENGTH))


@pytest.fixture(scope="module")
def forward(random, texts):
    """Logits ``[3, SEQ_LENGTH, V]`` of the texts, one full forward without a cache, each text alone."""
    model = random.build(seq_length=SEQ_LENGTH)
    return np.concatenate([model(int32(text[None]))[0].asnumpy() for text in texts])


def test_prefill_and_paged_decode_equal_one_full_forward(paged, texts, forward):
    """Three rows of unequal lengths, a single token among them; every block border is crossed."""
    fill_caches(paged, 100.0)  # what earlier calls left in the blocks must not matter
    lengths = np.array([5, 1, 15])
    pages = Pages([text[:length] for text, length in zip(texts, lengths, strict=True)], seed=1)
    logits = step(paged, pages, prefill=True)
    for _ in range(SEQ_LENGTH - 16):
        np.testing.assert_allclose(logits, forward[np.arange(3), lengths - 1], rtol=0, atol=2e-5)
        for row, length in enumerate(lengths):
            pages.rows[row].append(texts[row][length])
        lengths += 1
        logits = step(paged, pages, prefill=False)
    np.testing.assert_allclose(logits, forward[np.arange(3), lengths - 1], rtol=0, atol=2e-5)
    assert lengths.max() == SEQ_LENGTH - 1


def test_rows_that_are_finished_stay_as_they_are(paged, texts, forward):
    """MindFormers passes finished rows on with their last token and its slot; the others must not notice."""
    pages = Pages([texts[0][:4], texts[1][:9]], seed=2)
    step(paged, pages, prefill=True)
    for length in range(10, 15):
        pages.rows[1].append(texts[1][length - 1])
        logits = step(paged, pages, prefill=False)
        np.testing.assert_allclose(logits[0], forward[0, 3], rtol=0, atol=2e-5)
        np.testing.assert_allclose(logits[1], forward[1, length - 1], rtol=0, atol=2e-5)


def test_tokens_are_written_to_their_slots_and_nowhere_else(random, paged, texts):
    fill_caches(paged, -7.0)
    kv_heads = random.sizes.get("num_key_value_heads", random.sizes["n_head"])
    pages = Pages([texts[0][:6], texts[1][:3]], seed=3)
    before = [cache.asnumpy().copy() for cache in caches(paged)]
    slots = pages.prefill_slots()
    step(paged, pages, prefill=True, slots=slots)
    assert written_slots(paged, before, kv_heads) == [set(slots[slots >= 0])] * 4

    before = [cache.asnumpy().copy() for cache in caches(paged)]
    for row in (0, 1):
        pages.rows[row].append(texts[row][20])
    slots = pages.decode_slots()
    step(paged, pages, prefill=False, slots=np.array([slots[0], -1]))
    assert written_slots(paged, before, kv_heads) == [{slots[0]}] * 4


def test_one_prompt_that_fills_the_longest_sequence(paged, texts, forward):
    pages = Pages([texts[2]], seed=4)
    logits = step(paged, pages, prefill=True)
    np.testing.assert_allclose(logits[0], forward[2, -1], rtol=0, atol=2e-5)
