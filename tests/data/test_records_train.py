"""Records train: packed ones, with the attention reset, give the losses of their conversations alone."""

import numpy as np
import pytest
from data_lines import chat, read, write_lines

pytest.importorskip("mindspore")

import mindspore as ms  # noqa: E402

from research.telechat2.data.job import Options  # noqa: E402
from research.telechat2.data.preparing import prepare  # noqa: E402
from research.telechat2.telechat import TelechatForCausalLM  # noqa: E402
from research.telechat2.telechat_config import TelechatConfig  # noqa: E402

LENGTH = 80


def test_the_loss_over_packed_records_is_that_over_unpacked_ones(small_vocab, tmp_path):
    ms.set_context(mode=ms.GRAPH_MODE, device_target="CPU", jit_config={"jit_level": "O0"})
    ms.set_seed(5)
    lines = [chat("the fox" * (i % 3 + 1), "the dog " * (i % 4 + 1)) for i in range(9)]
    lines += [{"input": "生抽", "output": "老抽" * (i + 1)} for i in range(4)]
    packed = prepare(
        write_lines(tmp_path / "all.jsonl", lines), small_vocab, tmp_path / "all", Options(LENGTH)
    )
    alone = []
    for number, line in enumerate(lines):
        data = write_lines(tmp_path / f"{number}.jsonl", [line])
        alone += read(prepare(data, small_vocab, tmp_path / f"{number}", Options(LENGTH))["output"])
    records = read(packed["output"])
    assert len(alone) == len(lines) > 2 * len(records)
    config = TelechatConfig(
        hidden_size=64, num_layers=2, num_heads=4, n_kv_heads=2, intermediate_size=96, seq_length=LENGTH,
        vocab_size=packed["tokenizer"]["vocab_size"], sigma=0.3, compute_dtype="float32",
        document_start_ids=packed["document_start_ids"],
    )  # fmt: skip
    model = TelechatForCausalLM(config)
    model.set_train(True)
    loss, count = mean_loss(model, alone)
    packed_loss, packed_count = mean_loss(model, records)
    assert packed_count == count == packed["counts"]["trained_tokens"]
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    without_reset = TelechatForCausalLM(TelechatConfig(**{**config.to_dict(), "document_start_ids": []}))
    ms.load_param_into_net(without_reset, model.parameters_dict())
    without_reset.set_train(True)
    assert abs(mean_loss(without_reset, records)[0] - loss) > 1e-3


def mean_loss(model, records) -> tuple[float, int]:
    """Loss per trained token over all records, and how many those are."""
    losses, counts = [], []
    for ids, labels in records:
        losses.append(model(ms.Tensor(ids[None]), ms.Tensor(labels[None])).asnumpy().reshape(-1)[0])
        counts.append(int((labels[1:] != -100).sum()))
    return float(np.average(losses, weights=counts)), sum(counts)
