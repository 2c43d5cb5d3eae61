"""A checkpoint in another layout for inference: rows joined, or sharded for tensor parallelism, or both."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from research.telechat2.checkpoint.convert import given_path
from research.telechat2.checkpoint.job.job import Job, Options, Written
from research.telechat2.checkpoint.job.journal import part_folder
from research.telechat2.checkpoint.job.output import deal, require_folder
from research.telechat2.checkpoint.job.run import run_job
from research.telechat2.checkpoint.layouts.read import QKV_CONCAT, TENSOR_PARALLEL, plan_checkpoint
from research.telechat2.checkpoint.layouts.tensor_parallel import (
    check_divisible,
    glue_ranks,
    join_rows,
    part_of_rank,
    part_rows,
)
from research.telechat2.checkpoint.plan import Plan, make_plan
from research.telechat2.checkpoint.release.companion_files import YAMLS, companions, notes_of, small_files
from research.telechat2.checkpoint.sizes import TelechatSizes, sizes_beside
from research.telechat2.checkpoint.storage.folders import rank_folders
from research.telechat2.checkpoint.storage.tensor import StoredTensor, Weights
from research.telechat2.common.errors import UsageError

SUFFIXES = (".safetensors", ".ckpt")
# Layers, hidden size, feed-forward size, heads, key/value heads and experts of the releases.
RELEASES = {
    "telechat_3B": (24, 3072, 6144, 24, 24, 0),
    "telechat_7B": (30, 4096, 12288, 32, 32, 0),
    "telechat_35B": (64, 6144, 20480, 48, 48, 0),
    "telechat_115B": (96, 8192, 40960, 64, 8, 0),
    "telechat_39B_A12B": (30, 4096, 6144, 32, 32, 16),
}
_VOCABULARY = 131072


@dataclass(frozen=True)
class Layout:
    """``ranks``: tensor-parallel size. ``joined``: with joined rows. ``folders``: a folder for each rank."""

    ranks: int
    joined: bool
    folders: bool

    @property
    def recorded(self) -> dict[str, str]:
        """What headers and manifest say of it."""
        count = str(self.ranks)
        joined = {QKV_CONCAT: count} if self.joined else {}
        return joined | ({TENSOR_PARALLEL: count} if self.folders else {})

    def __str__(self) -> str:
        ranks = "1 rank" if self.ranks == 1 else f"{self.ranks} ranks"
        rows = f"joined rows, stored for {ranks}" if self.joined else "rows not joined"
        return f"layout: {rows}, {f'a folder for each of {ranks}' if self.folders else 'whole'}"


def convert_layout(
    path: str | Path,
    target: str | Path,
    *,
    qkv_concat: bool,
    tensor_parallel: int | None = None,
    model_name: str | None = None,
    **options: Any,
) -> Written:
    """Write a checkpoint of any layout, torch or MindSpore, for the parallel inference model.

    Args:
        path: an HF folder, a MindSpore file or folder, or a folder of ``rank_*`` folders.
        target: a file for all weights (``.safetensors``, or ``.ckpt`` for one rank), or a folder: for
            ``rank_0/checkpoint_0.safetensors`` and so on if ``tensor_parallel`` is given or ``path`` is such
            a folder, else for ``model.safetensors`` or shards.
        qkv_concat: join the rows of wq and wk_v, and those of w1 and w3.
        tensor_parallel: number of ranks; None: those of ``path``, or one.
        model_name: a name such as telechat_7B, which must be that of a release of these sizes; it tells the
            number of heads where there is no config.json.
        options: the fields of ``Options``.

    Raises:
        UsageError: a source that is broken, sizes that do not divide, unknown heads, a name of another size,
            a layout that the target cannot have, a target that exists, or as ``run_job``.
    """
    source, target = given_path(path, "the path of the checkpoint"), given_path(target, "the new path")
    asked = Options(**options)
    plan = _plan(source, model_name)
    if (to_folder := target.suffix not in SUFFIXES) and tensor_parallel is None:
        tensor_parallel = len(rank_folders(source)) or None
    if not to_folder and tensor_parallel is not None:
        _require_sense(target, qkv_concat, tensor_parallel)
    ranks = 1 if tensor_parallel is None else tensor_parallel
    layout = Layout(ranks, qkv_concat, folders=to_folder and tensor_parallel is not None)
    check_divisible(plan.sizes, layout.ranks)
    if layout.folders:
        folder, files = target, _rank_files(plan, layout)
        _refuse_ranks(target, asked, source)
    else:
        weights = join_rows(plan.parameters, plan.sizes, layout.ranks) if qkv_concat else plan.parameters
        folder, files = deal(target, _named(weights), asked, source, SUFFIXES)
    origin = source if source.is_dir() else source.parent
    yamls = companions(origin, YAMLS) if folder == target else {}
    along = companions(origin) | yamls if folder == target else {}
    job = Job(
        source=source,
        sources=plan.named_sources,
        files=files,
        back=lambda tensors: _back(plan, layout, tensors),
        framework="ms",
        beside=small_files(source, target, folder) | along,
        layout=layout.recorded,
        notes=(
            *notes_of(plan, source, target, folder),
            str(layout),
            *([f"{' and '.join(yamls)} of the input: copied unchanged"] if yamls else []),
        ),
        ignored=plan.ignored,
    )
    return run_job(job, folder, asked)


def sizes_of_release(name: str) -> TelechatSizes:
    """The sizes of the release that ``name`` means, in any case; UsageError if it is none."""
    spelled = {release.lower(): release for release in RELEASES}
    release = spelled.get(name.lower().replace("-", "_").replace("telechat2_", "telechat_"))
    if release is None:
        raise UsageError(f"--model_name {name} is unknown; expected one of {', '.join(RELEASES)}, or none")
    layers, hidden, ffn, heads, kv_heads, experts = RELEASES[release]
    return TelechatSizes(
        num_layers=layers, hidden_size=hidden, intermediate_size=ffn, vocab_size=_VOCABULARY,
        kv_size=kv_heads * (hidden // heads), num_heads=heads, n_kv_heads=kv_heads, num_experts=experts,
    )  # fmt: skip


def check_model_name(name: str, found: TelechatSizes) -> None:
    """UsageError if ``name`` is none of the releases', or that of one of other sizes or heads."""
    release = sizes_of_release(name)
    compared = ("num_layers", "hidden_size", "intermediate_size", "kv_size", "num_heads", "n_kv_heads")
    different = [
        f"{size} {there} instead of {getattr(release, size)}"
        for size in compared
        if (there := getattr(found, size)) is not None and there != getattr(release, size)
    ]
    expert_words = f", {release.num_experts} experts" if release.num_experts else ""
    if different or (found.num_experts or 0) != release.num_experts:
        raise UsageError(
            f"--model_name {name} is a model of {release.num_layers} layers, hidden size "
            f"{release.hidden_size}{expert_words}, but the checkpoint is of "
            f"{found.describe()} ({', '.join(different) or 'other experts'}); give the name of this "
            "checkpoint's release, or put its config.json beside the weights and leave --model_name out"
        )


def _plan(source: Path, model_name: str | None) -> Plan:
    """Match ``source`` with the table; the release of ``model_name`` tells the heads without config.json."""
    sizes = sizes_beside(source)
    if model_name is None:
        return plan_checkpoint(source, sizes)
    release = sizes_of_release(model_name)
    plan = plan_checkpoint(source, sizes, release)
    check_model_name(model_name, plan.sizes)
    if sizes is not None:
        return plan
    heads = replace(plan.sizes, num_heads=release.num_heads, n_kv_heads=release.n_kv_heads)
    return replace(plan, sizes=heads)


def _require_sense(target: Path, qkv_concat: bool, tensor_parallel: int) -> None:
    """Refuse what a single file cannot be."""
    if not qkv_concat:
        raise UsageError(
            f"{target} is one file of all weights, which without --qkv_concat True is the same for any "
            "number of ranks; name a folder, which receives a file for each rank, or leave out "
            "--tensor_parallel"
        )
    if target.suffix == ".ckpt" and tensor_parallel > 1:
        raise UsageError(
            f"{target}: a .ckpt file cannot record that its rows are stored for {tensor_parallel} ranks, and "
            "would be loaded wrongly by others; name a .safetensors file, or a folder"
        )


def _rank_files(plan: Plan, layout: Layout) -> dict[str, Weights]:
    whole = plan.parameters
    return {
        f"rank_{rank}/checkpoint_{rank}.safetensors": _named(
            part_of_rank(whole, plan.sizes, layout.ranks, rank, layout.joined)
        )
        for rank in range(layout.ranks)
    }


def _refuse_ranks(folder: Path, options: Options, source: Path) -> None:
    if options.max_shard_size is not None:
        raise UsageError("--max_shard_size does not go with ranks, each of which has one file; leave it out")
    if not (options.resume and part_folder(folder, "").exists()):
        require_folder(folder, source, "rank_[0-9]*")


def _back(plan: Plan, layout: Layout, tensors: list[StoredTensor]) -> Weights:
    """The tensors of the source, from those of the new files."""
    if layout.folders:
        by_folder: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for tensor in tensors:
            by_folder[tensor.file.parent.name][tensor.name] = tensor
        tensors = glue_ranks([by_folder[f"rank_{rank}"] for rank in range(layout.ranks)])
    whole = part_rows(tensors, plan.sizes, layout.ranks)
    found = make_plan(whole, "mindspore", plan.sizes, "what was written")
    return found.weights if plan.side == "torch" else _named(found.named_sources)


def _named(weights: Mapping[str, StoredTensor]) -> Weights:
    return [(tensor, name) for name, tensor in weights.items()]
