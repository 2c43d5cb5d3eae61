"""Small random plans for the agreement of check and compiler: a quarter of them without a flaw."""

import random
from pathlib import Path

from research.telechat2.config.preflight import read_settings

# data_parallel, model_parallel and pipeline_stage of numbers of devices that MindSpore takes.
CLUSTERS = [
    (dp, mp, stages)
    for dp in (1, 2, 3, 4, 6, 8)
    for mp in (1, 2, 3, 4, 6, 8)
    for stages in range(1, 4)
    if dp * mp * stages in (2, 4, 8, 16, 24)
]
MODEL, PLAN, OPTIMIZER = "model.model_config.", "parallel_config.", "parallel.parallel_optimizer_config."


def random_plan(seed: int) -> dict:
    """Settings of a small model on at most 24 devices."""
    draw = random.Random(seed)
    changes = _sound(draw)
    if draw.random() < 0.75:
        changes |= _flaw(draw, changes)
    _, settings = read_settings("finetune_telechat_7b", changes, Path.cwd())
    return settings


def _sound(draw: random.Random) -> dict:
    """A plan whose sizes divide."""
    dp, mp, stages = draw.choice(CLUSTERS)
    chunks = draw.choice([1, 2]) if stages > 1 else 1
    base, remainder = draw.choice([1, 2]), draw.randrange(stages * chunks)
    offset = [1] * remainder + [0] * (stages * chunks - remainder)
    draw.shuffle(offset)
    offset = [offset[i * stages : (i + 1) * stages] for i in range(chunks)]
    kv_heads = mp * draw.choice([1, 2])
    changes = {
        PLAN + "data_parallel": dp,
        PLAN + "model_parallel": mp,
        PLAN + "pipeline_stage": stages,
        PLAN + "use_seq_parallel": draw.random() < 0.5,
        PLAN + "vocab_emb_dp": draw.random() < 0.3,
        PLAN + "micro_batch_num": stages + draw.choice([0, 1]) if stages > 1 else 1,
        MODEL + "num_layers": base * stages * chunks + remainder,
        MODEL + "offset": offset if chunks > 1 else offset[0],
        MODEL + "pp_interleave_num": chunks,
        MODEL + "num_heads": kv_heads * draw.choice([1, 2]),
        MODEL + "n_kv_heads": kv_heads,
        MODEL + "intermediate_size": 16 * mp,
        MODEL + "vocab_size": 48 * mp,
        MODEL + "seq_length": 12 * mp,
        "runner_config.batch_size": draw.choice([1, 2]),
        "recompute_config.recompute": draw.choice([True, False]),
        "recompute_config.select_recompute": draw.choice([True, False]),
        "parallel.enable_parallel_optimizer": draw.random() < 0.7,
        OPTIMIZER + "parallel_optimizer_threshold": draw.choice([0, 64]),
    }
    changes[MODEL + "hidden_size"] = 16 * changes[MODEL + "num_heads"]
    if chunks > 1:
        changes["parallel.pipeline_config"] = {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}
    if draw.random() < 0.3:
        changes |= _experts(draw, dp, mp)
    return changes


def _experts(draw: random.Random, dp: int, mp: int) -> dict:
    """A mixture whose experts can be placed on the ranks."""
    ep = draw.choice([n for n in (1, 2, 3, 4) if dp % n == 0])
    extend = draw.random() < 0.5
    changes = {
        PLAN + "expert_parallel": ep,
        "moe_config.expert_num": 2 * ep * mp,
        "moe_config.num_experts_chosen": 2,
        "moe_config.capacity_factor": draw.choice([1.5, 1.5, 0]),
        "moe_config.ep_extend_tp": extend,
    }
    return changes | ({PLAN + "use_seq_parallel": True} if extend else {})


def _flaw(draw: random.Random, changes: dict) -> dict:
    """One change that may or may not be legal."""
    mp = changes[PLAN + "model_parallel"]
    heads = changes[MODEL + "num_heads"]
    return draw.choice(
        [
            {PLAN + "model_parallel": mp + 1},
            {PLAN + "data_parallel": 5},
            {PLAN + "pipeline_stage": 2},
            {PLAN + "micro_batch_num": 1},
            {PLAN + "expert_parallel": 2},
            {PLAN + "use_seq_parallel": not changes[PLAN + "use_seq_parallel"]},
            {MODEL + "num_layers": changes[MODEL + "num_layers"] + 1},
            {MODEL + "offset": 0},
            {MODEL + "offset": 1},
            {MODEL + "n_kv_heads": 1},
            _heads(heads + 1),
            {MODEL + "hidden_size": 24 * heads},
            {MODEL + "intermediate_size": 16 * mp + 1},
            {MODEL + "vocab_size": 48 * mp + 1},
            {MODEL + "seq_length": 12 * mp + 1},
            {MODEL + "pp_interleave_num": 2},
            {MODEL + "tie_word_embeddings": True},
            {MODEL + "use_flash_attention": False},
            {"parallel.pipeline_config": {"pipeline_interleave": True, "pipeline_scheduler": "1f1b"}},
            {"parallel.gradients_mean": True},
            {"micro_batch_interleave_num": 2},
            {"recompute_config.recompute": [1]},
            {MODEL + "document_start_ids": [1]},
        ]
    )


def _heads(number: int) -> dict:
    return {
        MODEL + "num_heads": number,
        MODEL + "n_kv_heads": number,
        MODEL + "hidden_size": 16 * number,
    }
