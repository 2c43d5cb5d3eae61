"""Which tokens of packed records see each other, said as a mask and by where documents end."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("mindspore")

import mindspore as ms  # noqa: E402

from research.telechat2.model.kernels.packed_documents import CumulativeLengths, DocumentMask  # noqa: E402

STARTS = [1, 6]
RECORDS = st.tuples(st.sampled_from([2, 4]), st.integers(1, 12)).flatmap(
    lambda shape: st.lists(
        st.lists(st.integers(0, 9), min_size=shape[1], max_size=shape[1]),
        min_size=shape[0],
        max_size=shape[0],
    )
)


@pytest.fixture(scope="module", autouse=True)
def pynative():
    """Every record would have a graph of its own."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield
    ms.set_context(mode=ms.GRAPH_MODE)


def documents_of(record):
    """The (first, end) of each document; what stands before the first start is one too."""
    firsts = [0] + [i for i, token in enumerate(record) if token in STARTS and i > 0]
    return list(zip(firsts, firsts[1:] + [len(record)], strict=True))


@settings(max_examples=40, deadline=None)
@given(RECORDS, st.sampled_from([1, 2]))
def test_mask_and_lengths_keep_the_same_documents_apart(records, devices):
    tokens, length = ms.Tensor(np.array(records, np.int32)), len(records[0])
    hidden = DocumentMask(STARTS)(tokens).asnumpy()[:, 0]
    ends = CumulativeLengths(STARTS, 16)
    ends.parts = devices
    ends = ends(tokens).asnumpy()
    assert ends.dtype == np.int64
    on_device = len(records) // devices
    for row, record in enumerate(records):
        documents = documents_of(record)
        visible = np.zeros((length, length), bool)
        for first, end in documents:
            visible[first:end, first:end] = np.tril(np.ones((end - first, end - first), bool))
        assert (~hidden[row] == visible).all()
        before = row % on_device * length
        expected = [before + end for _, end in documents] + [before + length] * (16 - len(documents))
        assert ends.reshape(len(records), 16)[row].tolist() == expected


def test_the_last_length_reaches_the_end_of_the_record():
    """More documents than max_documents: the last ones become one, and no token is left out."""
    tokens = ms.Tensor(np.array([[1, 2, 1, 2, 6, 2, 1]], np.int32))
    assert CumulativeLengths(STARTS, 3)(tokens).asnumpy().tolist() == [2, 4, 7]
