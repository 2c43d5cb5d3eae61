"""Reading a checkpoint of any layout: whole, with joined rows, or sharded for tensor parallelism.

A file's header records what it is stored for: ``qkv_concat`` is the tensor-parallel size that joined rows are
stored for, ``tensor_parallel`` the number of ranks that share the checkpoint. Whichever it is, the readers
give the training model's weights, from which every layout can be made (see tensor_parallel.py).
"""

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from research.telechat2.checkpoint.job.manifest import NAME as MANIFEST
from research.telechat2.checkpoint.layouts.tensor_parallel import (
    Tensors,
    check_divisible,
    glue_ranks,
    is_joined,
    part_of_rank,
    part_rows,
)
from research.telechat2.checkpoint.plan import Plan, make_plan
from research.telechat2.checkpoint.sizes import TelechatSizes, sizes_beside
from research.telechat2.checkpoint.storage.folders import (
    rank_folders,
    read_mindspore_source,
    read_torch_source,
    visible,
)
from research.telechat2.checkpoint.storage.rank_folders import saved_shards
from research.telechat2.checkpoint.storage.recognise import is_torch_source
from research.telechat2.checkpoint.storage.safetensors_format import read_metadata, read_safetensors
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import read_json

QKV_CONCAT, TENSOR_PARALLEL = "qkv_concat", "tensor_parallel"  # keys of headers
_COMPARED = ("num_layers", "hidden_size", "intermediate_size", "vocab_size", "kv_size", "num_experts",
             "tie_word_embeddings")  # fmt: skip


def weights_of_rank(
    path: str | Path, sizes: TelechatSizes, *, tensor_parallel: int, rank: int, qkv_concat: bool
) -> Tensors:
    """What one rank of the parallel inference model loads: its parameters by name, in the layout they have.

    Args:
        path: an HF folder of a TeleChat model, a MindSpore file or folder, with rows joined for any number of
            ranks or not, or a folder of ``rank_*`` folders of any number of ranks.
        sizes: those of the model that is to be loaded, see ``sizes_of_model``.
        tensor_parallel: number of ranks of the group; rank: 0 to that.
        qkv_concat: as the model's config says.

    Only headers are read here, and later only the bytes that this rank has: of the two matrices that are
    split along their columns (wo and w2), whole rows.

    Raises:
        UsageError: a checkpoint that is broken, incomplete, or of other sizes, or sizes that do not divide.
    """
    check_divisible(sizes, tensor_parallel)
    found, whole = whole_weights(path, sizes)
    different = [
        f"{name} {there} instead of {here}"
        for name in _COMPARED
        if (here := getattr(sizes, name)) is not None and (there := getattr(found, name)) != here
    ]
    if different:
        raise UsageError(
            f"{path} does not fit the model of the YAML: it has {', '.join(different)}. Use the YAML of this "
            "checkpoint's size and kind, dense or mixture of experts"
        )
    return part_of_rank(whole, sizes, tensor_parallel, rank, qkv_concat)


def whole_weights(path: str | Path, sizes: TelechatSizes | None = None) -> tuple[TelechatSizes, Tensors]:
    """The sizes of a checkpoint of any layout, torch or MindSpore, and its weights as the training model's.

    The sizes are those of config.json, where there is one beside it, else those that show in the tensors. Of
    ``sizes`` only the heads are used, and only to part joined rows that have no config.json beside them.

    Raises:
        UsageError: a checkpoint that is broken, incomplete, or not as its config.json says; or of other
            heads than ``sizes`` says.
    """
    path = Path(path)
    configured = sizes_beside(path)
    if sizes is not None and configured is not None:
        _require_heads_of(path, configured, sizes)
    plan = plan_checkpoint(path, configured, sizes)
    return plan.sizes, {name: replace(tensor, name=name) for name, tensor in plan.parameters.items()}


def plan_checkpoint(path: Path, configured: TelechatSizes | None, heads: TelechatSizes | None = None) -> Plan:
    """Match a checkpoint of either side and of any layout with the table.

    ``configured``: the sizes of its config.json, if there is one. ``heads``: sizes for joined rows without
    it.

    Raises:
        UsageError: a checkpoint that is broken, incomplete, or not as its config.json says.
    """
    return plan_torch(path, configured) if is_torch_source(path) else plan_mindspore(path, configured, heads)


def plan_torch(path: Path, configured: TelechatSizes | None) -> Plan:
    """Match an HF folder, or one of its files, with the table; see plan_checkpoint."""
    return make_plan(read_torch_source(path), "torch", configured, str(path))


def plan_mindspore(path: Path, configured: TelechatSizes | None, heads: TelechatSizes | None = None) -> Plan:
    """Match a MindSpore checkpoint of any layout with the table; see plan_checkpoint."""
    tensors = read_whole(path, configured or heads)
    try:
        return make_plan(tensors, "mindspore", configured, str(path))
    except UsageError as error:
        if len(rank_folders(path)) < 2:
            raise
        raise UsageError(
            f"{error}\nIts ranks are taken for those of tensor parallelism. If each of them has saved the "
            "whole model (data parallelism), give one file of rank_0; if a training cluster has saved its "
            "slices, merge them first with research/telechat2/transform_ckpt.py"
        ) from None


def read_whole(path: Path, sizes: TelechatSizes | None) -> list[StoredTensor]:
    """The tensors of a MindSpore checkpoint of any layout: glued, and joined rows taken apart.

    For how many ranks joined rows are stored, the headers say, or the manifest beside the files; else the
    number of rank folders shows it, or the user says it with ``--joined_for``.

    Raises:
        UsageError: nothing there to read, ranks that do not go together, or joined rows and no ``sizes``.
    """
    ranks = rank_folders(path)
    if len(ranks) > 1:
        shards = saved_shards(path, max(ranks) + 1, f"rank_{max(ranks)} is there")
        tensors, group = glue_ranks(shards), len(ranks)
        recorded = _recorded(tensor.file for shard in shards for tensor in shard.values())
    else:
        tensors, group = read_mindspore_source(path), 1
        recorded = _recorded(tensor.file for tensor in tensors)
    if recorded.get(TENSOR_PARALLEL, group) != group:
        raise UsageError(
            f"{path} holds {group} of the {recorded[TENSOR_PARALLEL]} ranks that share its checkpoint; "
            f"give the folder that holds rank_0 to rank_{recorded[TENSOR_PARALLEL] - 1}"
        )
    if not is_joined(tensor.name for tensor in tensors):
        return tensors
    if sizes is None:
        raise UsageError(
            f"{path} has joined rows (qkv_concat), which take the number of heads to part, and that the "
            "tensors do not show; put the model's config.json beside them"
        )
    known = recorded.get(QKV_CONCAT) or _of_manifest(tensors)
    if known is None and ranks:
        known = group
        print(
            f"{path} does not record the tensor-parallel size that its joined rows are stored for; taken as "
            f"stored for tensor-parallel size {group}, the number of its folders",
            file=sys.stderr,
        )
    joined_for = _joined_for(path, known)
    if group not in (1, joined_for):
        raise UsageError(f"{path} holds {group} ranks, but its rows are stored for {joined_for}")
    return part_rows(tensors, sizes, joined_for)


_ASKED: dict[str, int] = {}


def assume_joined_for(ranks: int | None) -> None:
    """Use ``--joined_for`` of the command line, in this process, for checkpoints that record no layout.

    Raises:
        UsageError: it is no number of ranks.
    """
    if ranks is not None and ranks < 1:
        raise UsageError(f"--joined_for is {ranks}; expected the number of ranks, 1 or more")
    _ASKED.clear()
    if ranks is not None:
        _ASKED["joined_for"] = ranks


def _joined_for(path: Path, known: int | None) -> int:
    """For how many ranks joined rows are stored: as is known of the checkpoint, or as the user says."""
    asked = _ASKED.get("joined_for")
    if known and asked and known != asked:
        raise UsageError(
            f"--joined_for is {asked}, but the rows of {path} are stored for tensor-parallel size {known}, "
            "as recorded with it; leave --joined_for out"
        )
    if (found := known or asked) is None:
        raise UsageError(
            f"{path} has joined rows (qkv_concat), but neither its header nor a manifest beside it records "
            "the tensor-parallel size that they are stored for. The tensors do not show it, and with another "
            "size the answers would be wrong. Give --joined_for N (1 for a file that "
            "MindFormers' convert_weight.py made), which convert_weight.py --pre_ckpt_path, "
            "convert_reversed.py, run_telechat_predict.py and run_mindformer.py take; or convert the "
            "original weights again"
        )
    return found


def _recorded(files: Iterable[Path]) -> dict[str, int]:
    """What the files' headers say of their layout; they must agree.

    Raises:
        UsageError: they do not, or say what is no number of ranks.
    """
    recorded: dict[str, int] = {}
    first = None
    for file in dict.fromkeys(files):
        header = read_metadata(file) if file.suffix == ".safetensors" else {}
        found = {key: _ranks(header, key, file) for key in (QKV_CONCAT, TENSOR_PARALLEL) if key in header}
        if first is not None and found != recorded:
            raise UsageError(
                f"{first} and {file} say different things of their layout ({recorded or 'nothing'} and "
                f"{found or 'nothing'}); they are of different checkpoints"
            )
        first, recorded = file, found
    return recorded


def _of_manifest(tensors: Iterable[StoredTensor]) -> int | None:
    """The number of ranks that the manifest beside the files records; None where there is none."""
    for file in dict.fromkeys(tensor.file for tensor in tensors):
        for manifest in (file.with_name(f"{file.name}.{MANIFEST}"), file.with_name(MANIFEST)):
            content = read_json(manifest) or {}
            options = content.get("options")
            layout = options.get("layout") if isinstance(options, dict) else None
            files = content.get("files")
            listed_here = isinstance(files, dict) and file.name in files
            if listed_here and isinstance(layout, dict) and QKV_CONCAT in layout:
                return _ranks(layout, QKV_CONCAT, manifest)
    return None


def _ranks(record: Mapping[str, object], key: str, file: Path) -> int:
    text = str(record[key])
    if not re.fullmatch("[1-9][0-9]*", text):
        raise UsageError(f"{file} says {key} = {record[key]!r}; expected a number of ranks")
    return int(text)


def _require_heads_of(path: Path, found: TelechatSizes, sizes: TelechatSizes) -> None:
    """Heads show in no tensor: with another number of them the same rows would load and answers be wrong."""
    heads = found.num_heads, found.n_kv_heads
    if None not in (sizes.num_heads, sizes.n_kv_heads) and heads != (sizes.num_heads, sizes.n_kv_heads):
        raise UsageError(
            f"the config.json of {path} says {heads[0]} heads and {heads[1]} key/value heads, but the model "
            f"of the YAML has {sizes.num_heads} and {sizes.n_kv_heads}. Use the YAML of this checkpoint's "
            "size"
        )


def is_for_inference(path: Path) -> bool:
    """Whether safetensors say that they are sharded for tensor parallelism, or have joined rows."""
    folder = next(iter(rank_folders(path).values()), path)
    files = [path] if path.is_file() else visible(folder, "*.safetensors")
    return any(
        {QKV_CONCAT, TENSOR_PARALLEL} & read_metadata(file).keys()
        or is_joined(tensor.name for tensor in read_safetensors(file))
        for file in files
        if file.suffix == ".safetensors"
    )
