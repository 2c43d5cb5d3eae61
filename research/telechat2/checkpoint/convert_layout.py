"""A checkpoint in another layout for inference: rows joined, or cut for tensor-parallel ranks, or both."""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from pathlib import Path

from research.telechat2.checkpoint.convert import (
    Summary,
    checked_options,
    config_name,
    given_path,
    notes_of,
    small_files,
)
from research.telechat2.checkpoint.job.journal import part_folder
from research.telechat2.checkpoint.job.output import Weights, deal, refuse_own_folder
from research.telechat2.checkpoint.job.run import Job, Options, run_job
from research.telechat2.checkpoint.layouts.read import (
    QKV_CONCAT,
    TENSOR_PARALLEL,
    is_torch_source,
    rank_folders,
    read_whole,
)
from research.telechat2.checkpoint.layouts.tensor_parallel import (
    check_divisible,
    glue_ranks,
    join_rows,
    part_of_rank,
    part_rows,
)
from research.telechat2.checkpoint.llama.companion_files import YAMLS, companions
from research.telechat2.checkpoint.plan import Plan, make_plan
from research.telechat2.checkpoint.sizes import TelechatSizes, sizes_beside
from research.telechat2.checkpoint.storage.folders import read_torch_source
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.checkpoint.table import canonical_name
from research.telechat2.common.errors import UsageError
from research.telechat2.text import prompt_format as prompt_formats

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


def convert_layout(
    path: str | Path,
    target: str | Path,
    *,
    qkv_concat: bool,
    tensor_parallel: int | None = None,
    model_name: str | None = None,
    **options,
) -> Summary:
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
    options = checked_options(options)
    is_torch = is_torch_source(source)
    sizes = sizes_beside(source)
    release = None if model_name is None else sizes_of_release(model_name)
    if is_torch:
        plan = make_plan(read_torch_source(source), "torch", sizes, str(source))
        whole = {name: tensor for tensor, name in plan.weights}
    else:
        plan = make_plan(read_whole(source, sizes or release), "mindspore", sizes, str(source))
        whole = {tensor.name: tensor for tensor in plan.sources}
    if release is not None:
        check_model_name(model_name, plan.sizes)
        heads = {"num_heads": release.num_heads, "n_kv_heads": release.n_kv_heads}
        plan = plan if sizes else replace(plan, sizes=replace(plan.sizes, **heads))
    into_ranks = target.suffix not in SUFFIXES
    if into_ranks and tensor_parallel is None:
        tensor_parallel = len(rank_folders(source)) or None
    into_ranks = into_ranks and tensor_parallel is not None
    _require_sense(target, qkv_concat, tensor_parallel, into_ranks)
    count = 1 if tensor_parallel is None else tensor_parallel
    check_divisible(plan.sizes, count)
    if into_ranks:
        folder, files = target, _rank_files(whole, plan.sizes, count, qkv_concat)
        _refuse_ranks(target, options, source)
    else:
        weights = join_rows(whole, plan.sizes, count) if qkv_concat else whole
        folder, files = deal(target, _named(weights), options, source, SUFFIXES)
    prompt_format = prompt_formats.find(source)
    whole_folder = folder == target
    origin = source if source.is_dir() else source.parent
    yamls = companions(origin, YAMLS) if whole_folder else {}
    along = companions(origin) | yamls if whole_folder else {}
    job = Job(
        source=source,
        sources=_sources(plan, whole, is_torch),
        files=files,
        back=partial(_back, plan, is_torch, count),
        framework="ms",
        beside=small_files(source, target, folder, prompt_format) | along,
        layout=_layout(qkv_concat, count, into_ranks),
        notes=(
            *notes_of(plan, prompt_format, source, config_name(target, folder)),
            _described(qkv_concat, count, into_ranks),
            *([f"{' and '.join(yamls)} of the input: copied unchanged"] if yamls else []),
        ),
    )
    done = run_job(job, folder, options)
    return Summary(**vars(done), sizes=plan.sizes, ignored=plan.ignored, prompt_format=prompt_format)


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


def _require_sense(target: Path, qkv_concat: bool, tensor_parallel: int | None, into_ranks: bool) -> None:
    """Refuse what a single file cannot be."""
    if into_ranks or tensor_parallel is None:
        return
    if not qkv_concat:
        raise UsageError(
            f"{target} is one file of all weights, which without --qkv_concat True is the same for any "
            "number of ranks; name a folder, which receives a file for each rank, or leave out "
            "--tensor_parallel"
        )
    if target.suffix == ".ckpt" and tensor_parallel > 1:
        raise UsageError(
            f"{target}: a .ckpt file cannot say that its rows are joined for {tensor_parallel} ranks, and "
            "would be loaded wrongly by others; name a .safetensors file, or a folder"
        )


def _rank_files(
    whole: dict[str, StoredTensor], sizes: TelechatSizes, tensor_parallel: int, qkv_concat: bool
) -> dict[str, Weights]:
    return {
        f"rank_{rank}/checkpoint_{rank}.safetensors": _named(
            part_of_rank(whole, sizes, tensor_parallel, rank, qkv_concat)
        )
        for rank in range(tensor_parallel)
    }


def _refuse_ranks(folder: Path, options: Options, source: Path) -> None:
    if options.max_shard_size is not None:
        raise UsageError("--max_shard_size does not go with ranks, each of which has one file; leave it out")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; expected a folder, or a path that does not exist yet")
    if options.resume and part_folder(folder, "").exists():
        return
    refuse_own_folder(folder, source)
    if there := rank_folders(folder):
        raise UsageError(
            f"{folder} already holds {there[0].name}; nothing is overwritten: give another folder, or delete "
            "the old checkpoint"
        )


def _sources(plan: Plan, whole: dict[str, StoredTensor], is_torch: bool) -> dict[str, StoredTensor]:
    if not is_torch:
        return whole
    return {canonical_name(tensor.name, "torch"): tensor for tensor in plan.sources}


def _back(plan: Plan, is_torch: bool, tensor_parallel: int, tensors: list[StoredTensor]) -> Weights:
    """The tensors of the source, from those of the new files."""
    by_folder: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for tensor in tensors:
        by_folder[tensor.file.parent.name][tensor.name] = tensor
    ranks = [f"rank_{rank}" for rank in range(tensor_parallel)]
    if by_folder.keys() == set(ranks):
        tensors = glue_ranks([by_folder[rank] for rank in ranks])
    found = make_plan(
        part_rows(tensors, plan.sizes, tensor_parallel), "mindspore", plan.sizes, "what was written"
    )
    return found.weights if is_torch else [(tensor, tensor.name) for tensor in found.sources]


def _layout(qkv_concat: bool, tensor_parallel: int, into_ranks: bool) -> dict[str, str]:
    count = str(tensor_parallel)
    return ({QKV_CONCAT: count} if qkv_concat else {}) | ({TENSOR_PARALLEL: count} if into_ranks else {})


def _described(qkv_concat: bool, tensor_parallel: int, into_ranks: bool) -> str:
    ranks = "1 rank" if tensor_parallel == 1 else f"{tensor_parallel} ranks"
    rows = f"rows joined for {ranks}" if qkv_concat else "rows not joined"
    return f"layout: {rows}, {f'a folder for each of {ranks}' if into_ranks else 'whole'}"


def _named(weights: dict[str, StoredTensor]) -> Weights:
    return [(tensor, name) for name, tensor in weights.items()]
