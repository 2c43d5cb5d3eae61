"""Reference implementations of kernels against plain NumPy in float64, with the gradients of training."""

from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

from research.telechat2.model.kernels import reference as reference_kernels
from research.telechat2.model.kernels.select import ReferenceKernels
from research.telechat2.telechat_config import TelechatConfig

rng = np.random.default_rng()


@pytest.fixture(autouse=True)
def same_numbers_whatever_runs_before():
    rng.bit_generator.state = np.random.default_rng(5).bit_generator.state


def normal(*shape) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


class Gradients(nn.Cell):
    """Gradients of a cell's output, or tuple of outputs, for given gradients of the outputs."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell
        self.gradients = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *inputs):
        return self.gradients(self.cell)(*inputs)


def numeric_gradient(function, arrays, index: int, upstream: np.ndarray) -> np.ndarray:
    """``d sum(function(*arrays) * upstream) / d arrays[index]`` by central differences in float64."""
    arrays = [np.asarray(array, np.float64) for array in arrays]
    found = np.empty_like(arrays[index])
    for position in np.ndindex(found.shape):
        sums = []
        for sign in (1, -1):
            moved = arrays[index].copy()
            moved[position] += sign * 1e-5
            sums.append(np.sum(function(*arrays[:index], moved, *arrays[index + 1 :]) * upstream))
        found[position] = (sums[0] - sums[1]) / 2e-5
    return found


def assert_close(found, expected, tolerance=1e-6):
    """Equal up to ``tolerance``, relative to the largest value expected."""
    found = found.asnumpy() if isinstance(found, Tensor) else found
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def check(cell, reference, arrays, differentiable=None, tolerance=2e-6):
    """Compare outputs, and the gradients of the first ``differentiable`` inputs, with the reference's."""
    tensors = [Tensor(array) for array in arrays]
    expected = reference(*(np.asarray(array, np.float64) for array in arrays))
    assert_close(cell(*tensors), expected, tolerance)
    upstream = normal(*expected.shape)
    found = Gradients(cell)(*tensors, Tensor(upstream))
    for index in range(len(arrays) if differentiable is None else differentiable):
        assert_close(found[index], numeric_gradient(reference, arrays, index, upstream), 5 * tolerance)


@pytest.mark.parametrize("eps", [1e-5, 1e-8, 0.5])
def test_rms_norm(eps):
    def reference(x, weight):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * weight

    x = normal(5, 24) * np.float32([[1], [1e-3], [30], [1], [1]])  # a small row, where eps matters
    tensors = Tensor(x), Tensor(normal(24))
    check(reference_kernels.RMSNormReference(eps), reference, [x[[0, 2, 3]], normal(24)])
    small = reference_kernels.RMSNormReference(eps)(*tensors).asnumpy()
    expected = reference(x.astype(np.float64), tensors[1].asnumpy())
    np.testing.assert_allclose(small, expected, rtol=2e-6, atol=1e-8)


def test_swiglu():
    def reference(gate, up):
        return gate / (1 + np.exp(-gate)) * up

    check(reference_kernels.SwiGLUReference(), reference, [3 * normal(6, 20), normal(6, 20)])


def rotate(x, cos, sin):
    """Channels i and i + D/2 turned by the same angle, as complex numbers."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos[..., :half] + 1j * sin[..., :half])
    return np.concatenate((turned.real, turned.imag), -1)


def tables(length: int, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    angles = np.outer(np.arange(length), 10.0 ** -np.linspace(0, 2, head_dim // 2))
    angles = np.concatenate((angles, angles), -1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def test_rotary_of_whole_sequences():
    query, key = normal(2, 6, 4, 8), normal(2, 6, 2, 8)
    cos, sin = tables(6, 8)

    def reference(query, key, *_):
        return np.concatenate([rotate(x, cos[:, None], sin[:, None]) for x in (query, key)], 2)

    class Both(nn.Cell):
        def __init__(self):
            super().__init__()
            config = SimpleNamespace(num_heads=4, n_kv_heads=2, softmax_compute_type=ms.float32)
            self.inputs = reference_kernels.SequenceInputsReference(config)
            self.rotary = reference_kernels.RotaryReference()
            self.concat = ops.Concat(2)

        def construct(self, query, key, cos, sin):
            query_tables, key_tables, _ = self.inputs(cos, sin, 2, None)
            return self.concat(self.rotary(query, key, query_tables, key_tables))

    check(Both(), reference, [query, key, cos, sin], differentiable=2)


def test_rotary_of_single_tokens():
    """Heads lie side by side in a token's channels; every token has a position of its own."""
    query, key = normal(5, 3 * 8), normal(5, 8)
    cos, sin = (table[[4, 0, 7, 7, 2]] for table in tables(8, 8))
    q, k = reference_kernels.RotaryTokensReference(8)(
        *map(Tensor, (query, key, cos, sin)), Tensor([5], ms.int32)
    )
    heads = rotate(query.reshape(5, 3, 8).astype(np.float64), cos[:, None], sin[:, None])
    assert_close(q, heads.reshape(5, 24))
    assert_close(k, rotate(key.astype(np.float64), cos, sin))


def softmax(scores):
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attention(query, key, value, visible):
    """One query head ``[S, D]`` on one key head ``[L, D]``; ``visible`` bool ``[S, L]``."""
    scores = np.where(visible, query @ key.T / np.sqrt(query.shape[-1]), -np.inf)
    return softmax(scores) @ value


def grouped(query, key, value, visible):
    """``[B, N, S, D]`` on ``[B, K, S, D]``: consecutive query heads share a key head."""
    group = query.shape[1] // key.shape[1]
    heads = [
        [attention(q, key[b, n // group], value[b, n // group], visible[b]) for n, q in enumerate(query[b])]
        for b in range(len(query))
    ]
    return np.array(heads)


class SequenceAttention(nn.Cell):
    """Training attention with the mask it is given in training."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, batch: int, masked=None):
        super().__init__()
        config = TelechatConfig(
            hidden_size=heads * head_dim, num_heads=heads, n_kv_heads=kv_heads, compute_dtype="float32"
        )
        self.inputs = ReferenceKernels().sequence_inputs(config)
        self.attention = ReferenceKernels().causal_attention(config).kernel
        self.batch, self.masked = batch, masked

    def construct(self, query, key, value):
        table = query[0, 0]
        return self.attention(query, key, value, self.inputs(table, table, self.batch, self.masked)[2])


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (6, 2), (3, 1)])
def test_causal_attention(heads, kv_heads):
    arrays = [normal(2, heads, 7, 4), normal(2, kv_heads, 7, 4), normal(2, kv_heads, 7, 4)]
    causal = np.tril(np.ones((2, 7, 7), bool))
    cell = SequenceAttention(heads, kv_heads, 4, 2)
    check(cell, lambda q, k, v: grouped(q, k, v, causal), arrays, tolerance=4e-6)


def test_attention_stays_finite_and_exact_where_scores_are_large():
    """Scores of some hundreds: one key takes all the weight, nothing overflows."""
    query, key, value = 40 * normal(1, 2, 9, 4), 40 * normal(1, 2, 9, 4), normal(1, 2, 9, 4)
    expected = grouped(
        *(x.astype(np.float64) for x in (query, key, value)), np.tril(np.ones((1, 9, 9), bool))
    )
    cell = SequenceAttention(2, 2, 4, 1)
    assert_close(cell(Tensor(query), Tensor(key), Tensor(value)), expected, 2e-4)
    gradients = Gradients(cell)(Tensor(query), Tensor(key), Tensor(value), Tensor(np.ones_like(query)))
    assert all(np.isfinite(gradient.asnumpy()).all() for gradient in gradients)


def test_attention_among_documents():
    visible = np.tril(np.ones((2, 6, 6), bool))
    visible[0, 3:, :3] = False
    visible[1, 5:, :5] = False
    arrays = [normal(2, 4, 6, 4), normal(2, 2, 6, 4), normal(2, 2, 6, 4)]
    cell = SequenceAttention(4, 2, 4, 2, Tensor(~visible[:, None]))
    check(cell, lambda q, k, v: grouped(q, k, v, visible), arrays, tolerance=4e-6)


def cross_entropy(logits, labels, mask):
    logits = logits - logits.max(-1, keepdims=True)
    log_probability = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    trained = np.flatnonzero(mask)
    return -sum(log_probability[t, labels[t]] for t in trained), len(trained)


def test_cross_entropy():
    """Ignored labels may hold anything, and neither they nor their logits have a gradient."""
    logits = 4 * normal(7, 11)
    labels = np.array([3, -100, 10, 0, -1, 5, 7], np.int32)
    mask = np.array([1, 0, 1, 1, 0, 0, 1], np.float32)

    def reference(logits):
        total, count = cross_entropy(logits, labels, mask)
        return np.array([total / count])

    class Mean(nn.Cell):
        def __init__(self):
            super().__init__()
            self.loss = reference_kernels.CrossEntropyReference()
            self.labels, self.mask = Tensor(labels), Tensor(mask)

        def construct(self, logits):
            total, count = self.loss(logits, self.labels, self.mask)
            return total / count

    check(Mean(), reference, [logits])
    gradient = Gradients(Mean())(Tensor(logits), Tensor([1.0], ms.float32))[0].asnumpy()
    assert np.all(gradient[mask == 0] == 0)

    numerator, denominator = reference_kernels.CrossEntropyReference()(*map(Tensor, (logits, labels, mask)))
    total, count = cross_entropy(logits.astype(np.float64), labels, mask)
    assert_close(numerator, np.array([total]))
    assert_close(denominator, np.array([float(count)]))


def test_cross_entropy_of_nothing_is_zero_over_something():
    labels, mask = Tensor([-100] * 3, ms.int32), Tensor(np.zeros(3, np.float32))
    total, count = reference_kernels.CrossEntropyReference()(Tensor(normal(3, 5)), labels, mask)
    assert total.asnumpy() == [0.0]
    assert 0 < count.asnumpy()[0] < 1


class Paged(nn.Cell):
    """One layer's paged attention with the inputs it is given, for prefill or for decode."""

    def __init__(self, config, prefill: bool, attention):
        super().__init__()
        self.inputs = ReferenceKernels().paged_inputs(config)
        self.attention = attention
        self.is_prefill = prefill

    def construct(self, query, key, value, positions, lengths, block_tables, slots):
        if self.is_prefill:
            inputs = self.inputs.prefill(positions, lengths, block_tables, slots)
            return self.attention.prefill(query, key, value, inputs, lengths)
        inputs = self.inputs.decode(positions, lengths, block_tables, slots)
        return self.attention.decode(query, key, value, inputs, lengths)


def heads_of(x: np.ndarray, head_dim: int) -> np.ndarray:
    """``[T, n*D]`` as ``[n, T, D]``."""
    return x.reshape(len(x), -1, head_dim).transpose(1, 0, 2)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (3, 1)])
def test_paged_attention(heads, kv_heads):
    """Prefill of three prompts in one flattened batch with padding, then decode; blocks by hand."""
    head_dim, block_size = 4, 3
    config = TelechatConfig(
        hidden_size=heads * head_dim, num_heads=heads, n_kv_heads=kv_heads, compute_dtype="float32",
        use_past=True, seq_length=12, block_size=block_size, num_blocks=9,
    )  # fmt: skip
    attention_cell = ReferenceKernels().paged_attention(config)
    lengths = [5, 1, 3]
    block_tables = np.array([[8, 0, -1, -1], [3, -1, -1, -1], [6, 2, -1, -1]], np.int32)
    rows = np.repeat(np.arange(3), lengths)
    positions = np.concatenate([np.arange(length) for length in lengths])
    slots = block_tables[rows, positions // block_size] * block_size + positions % block_size
    tokens = 9 + 2  # two of padding
    query, key, value = (normal(tokens, n * head_dim) for n in (heads, kv_heads, kv_heads))

    def call(prefill, query, key, value, positions, lengths, slots):
        integers = [Tensor(np.asarray(x, np.int32)) for x in (positions, lengths, block_tables, slots)]
        cell = Paged(config, prefill, attention_cell)
        return cell(Tensor(query), Tensor(key), Tensor(value), *integers).asnumpy()

    out = call(True, query, key, value, np.pad(positions, (0, 2)), lengths, np.append(slots, [-1, -1]))
    assert np.isfinite(out).all()
    seen = {}
    for row, length in enumerate(lengths):
        own = np.flatnonzero(rows == row)
        q, k, v = (heads_of(x[own].astype(np.float64), head_dim)[None] for x in (query, key, value))
        expected = grouped(q, k, v, np.tril(np.ones((1, length, length), bool)))[0]
        assert_close(out[own], expected.transpose(1, 0, 2).reshape(length, -1), 4e-6)
        seen[row] = k, v

    query, key, value = (normal(3, n * head_dim) for n in (heads, kv_heads, kv_heads))
    now = np.array(lengths)  # the second row's new token lies in its first block, the third's in a new one
    new_slots = block_tables[np.arange(3), now // block_size] * block_size + now % block_size
    out = call(False, query, key, value, now, now + 1, new_slots)
    for row, (k, v) in seen.items():
        q, k_new, v_new = (
            heads_of(x[row : row + 1].astype(np.float64), head_dim) for x in (query, key, value)
        )
        k, v = np.append(k, k_new[None], 2), np.append(v, v_new[None], 2)
        expected = grouped(q[None], k, v, np.ones((1, 1, k.shape[2]), bool))[0]
        assert_close(out[row], expected.reshape(-1), 4e-6)
