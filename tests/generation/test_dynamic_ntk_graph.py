"""Dynamic NTK's graphs compile for Ascend for any batch: tables in float32, cast after they are scaled."""

import re
from collections import Counter

import pytest

from research.telechat2.plan.dry_run.simulate import simulate

CONFIG = {
    "seq_length": 256, "max_position_embedding": 64, "extend_method": "DYNAMIC_NTK", "hidden_size": 256,
    "num_layers": 1, "num_heads": 4, "vocab_size": 512, "intermediate_size": 256, "use_past": True,
    "param_init_type": "bfloat16", "compute_dtype": "bfloat16", "rotary_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.slow
def test_graphs_gather_each_requests_tables(tmp_path):
    simulate("ntk_graph:build", {"config": CONFIG}, device_num=1, rank=0, folder=tmp_path)
    dumps = sorted((tmp_path / "ir" / "rank_0").glob("*_validate_*.ir"))
    assert len(dumps) == 2
    for dump, attention in zip(dumps, ("FlashAttentionScore", "PagedAttention"), strict=True):
        text = dump.read_text()
        found = Counter(re.findall(r"\) = (?:PrimFunc_)?([A-Za-z]+)\(", text))
        assert found[attention] == found["ApplyRotaryPosEmb"] == 1
        assert re.search(r"rotary_lengths: <Tensor\[Int32\], \(-1\)", text)
        assert re.search(r"Tensor\(shape=\[771, 64\], dtype=Float32|<Tensor\[Float32\], \(771, 64\)>", text)
        assert found["Gather"] >= 5  # first rows, scales, cos, sin, last tokens
