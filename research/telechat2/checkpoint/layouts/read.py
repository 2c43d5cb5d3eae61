"""Reading a checkpoint of any layout: whole, with joined rows, or cut for the ranks of tensor parallelism.

What a file is arranged for is recorded in its header: ``qkv_concat`` is the number of ranks whose rows are
joined, ``tensor_parallel`` the number of ranks that the checkpoint is cut for. Whichever it is, the readers
give the training model's weights, from which every layout can be made (see layouts.py).
"""

import re
import sys
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
from research.telechat2.checkpoint.llama.config_values import read_json
from research.telechat2.checkpoint.plan import Plan, make_plan
from research.telechat2.checkpoint.sizes import TelechatSizes, sizes_beside
from research.telechat2.checkpoint.storage.folders import TRACKER, read_mindspore_source, read_torch_source
from research.telechat2.checkpoint.storage.rank_folders import saved_shards
from research.telechat2.checkpoint.storage.safetensors_format import read_metadata, read_safetensors
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.checkpoint.table import canonical_name
from research.telechat2.common.errors import UsageError

QKV_CONCAT, TENSOR_PARALLEL = "qkv_concat", "tensor_parallel"  # keys of headers


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

    Only headers are read here, and later only the bytes that this rank has: of the two matrices that are cut
    along their columns (wo and w2), whole rows.

    Raises:
        UsageError: a checkpoint that is broken, incomplete, or of other sizes, or sizes that do not divide.
    """
    check_divisible(sizes, tensor_parallel)
    found, whole = whole_weights(path, sizes)
    _require_sizes(path, found, sizes)
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
    if is_torch_source(path):
        plan = make_plan(read_torch_source(path), "torch", configured, str(path))
        return plan.sizes, {name: replace(tensor, name=name) for tensor, name in plan.weights}
    plan = plan_whole(path, configured, sizes)
    return plan.sizes, {tensor.name: tensor for tensor in plan.sources}


def plan_whole(path: Path, configured: TelechatSizes | None, sizes: TelechatSizes | None = None) -> Plan:
    """Match a MindSpore checkpoint of any layout with the table: by its config.json's sizes, if there is one.

    ``sizes`` are for joined rows without a config.json, see read_whole.

    Raises:
        UsageError: a checkpoint that is broken, incomplete, or not as its config.json says.
    """
    tensors = read_whole(path, configured or sizes)
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


def read_whole(path: Path, sizes: TelechatSizes | None, joined_for: int | None = None) -> list[StoredTensor]:
    """The tensors of a MindSpore checkpoint of any layout: glued, and joined rows taken apart.

    For how many ranks rows are joined, the headers say, or the manifest beside the files; folders of ranks
    show it by their number. ``joined_for``: the user's word where nothing does.

    Raises:
        UsageError: nothing there to read, ranks that do not go together, or joined rows and no ``sizes``.
    """
    ranks = rank_folders(path)
    if len(ranks) > 1:
        last = max(ranks, key=_rank_of)
        shards = saved_shards(path, _rank_of(last) + 1, f"{last.name} is there")
        tensors, group = glue_ranks(shards), len(ranks)
    else:
        tensors, group = read_mindspore_source(path), 1
    recorded = _recorded(tensors if group == 1 else [tensor for shard in shards for tensor in shard.values()])
    if recorded.get(TENSOR_PARALLEL, group) != group:
        raise UsageError(
            f"{path} holds {group} of the {recorded[TENSOR_PARALLEL]} ranks that its checkpoint is cut for; "
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
            f"{path} does not say for how many ranks its rows are joined; taken as joined for {group} "
            f"{'rank' if group == 1 else 'ranks'}, as there are folders",
            file=sys.stderr,
        )
    asked = joined_for or _ASKED.get("joined_for")
    if known and asked and known != asked:
        raise UsageError(
            f"--joined_for is {asked}, but the rows of {path} are joined for {known}, as recorded with it; "
            "leave --joined_for out"
        )
    if (found := known or asked) is None:
        raise UsageError(
            f"{path} has joined rows (qkv_concat), but neither its header nor a manifest beside it says for "
            "how many ranks they are joined, and the tensors do not show it: another number would load "
            "without an error, and answer nonsense. Give --joined_for N (1 for a file that MindFormers' "
            "convert_weight.py made), which convert_weight.py --pre_ckpt_path, convert_reversed.py, "
            "run_telechat_predict.py and run_mindformer.py take; or convert the original weights again"
        )
    if group not in (1, found):
        raise UsageError(f"{path} holds {group} ranks, but says that its rows are joined for {found}")
    return part_rows(tensors, sizes, found)


_ASKED: dict[str, int] = {}


def assume_joined_for(ranks: int | None) -> None:
    """Take the command line's word, in this process, for checkpoints that record no layout.

    Raises:
        UsageError: it is no number of ranks.
    """
    if ranks is not None and ranks < 1:
        raise UsageError(f"--joined_for is {ranks}; expected the number of ranks, 1 or more")
    _ASKED.clear()
    if ranks is not None:
        _ASKED["joined_for"] = ranks


def _of_manifest(tensors: list[StoredTensor]) -> int | None:
    """The number of ranks that the manifest beside the files records; None where there is none."""
    for file in dict.fromkeys(tensor.file for tensor in tensors):
        for manifest in (file.with_name(f"{file.name}.{MANIFEST}"), file.with_name(MANIFEST)):
            content = read_json(manifest) or {}
            options = content.get("options")
            layout = options.get("layout") if isinstance(options, dict) else None
            named = content.get("files") or {}
            if file.name in named and isinstance(layout, dict) and QKV_CONCAT in layout:
                return _number_of_ranks(layout[QKV_CONCAT], manifest)
    return None


def _number_of_ranks(value: object, file: Path) -> int:
    if not re.fullmatch("[1-9][0-9]*", str(value)):
        raise UsageError(f"{file} says {QKV_CONCAT} = {value!r}; expected a number of ranks")
    return int(value)


def is_torch_source(path: Path) -> bool:
    """Whether ``path`` is an HF folder of a TeleChat model, or one of its files; only headers are read.

    Raises:
        UsageError: a file is broken, or it is the folder of a Llama, which needs YAMLs of its own.
    """
    if path.is_file():
        files = [path]
    elif rank_folders(path) or (path / TRACKER).is_file():
        return False
    else:
        files = sorted(file for file in path.glob("*.safetensors") if not file.name.startswith("."))
        files = files or sorted(path.glob("pytorch_model*.bin"))
    if any(file.suffix == ".bin" for file in files):
        return True
    files = (file for file in files if file.suffix == ".safetensors")
    names = [tensor.name for file in files for tensor in read_safetensors(file)]
    if any(name.endswith(".self_attn.q_proj.weight") for name in names):
        raise UsageError(
            f"{path} holds a Llama model of Hugging Face; convert it first with "
            f"research/telechat2/convert_weight.py --torch_path {path} --mindspore_path NEW_DIR, which also "
            "writes the YAMLs that run it"
        )
    return any(canonical_name(name, "torch").startswith("transformer.") for name in names)


def _require_heads_of(path: Path, found: TelechatSizes, sizes: TelechatSizes) -> None:
    """Heads show in no tensor: with another number of them the same rows would load, and answer nonsense."""
    heads = found.num_heads, found.n_kv_heads
    if None not in (sizes.num_heads, sizes.n_kv_heads) and heads != (sizes.num_heads, sizes.n_kv_heads):
        raise UsageError(
            f"the config.json of {path} says {heads[0]} heads and {heads[1]} key/value heads, but the model "
            f"of the YAML has {sizes.num_heads} and {sizes.n_kv_heads}. Use the YAML of this checkpoint's "
            "size"
        )


def _require_sizes(path: str | Path, found: TelechatSizes, sizes: TelechatSizes) -> None:
    names = ("num_layers", "hidden_size", "intermediate_size", "vocab_size", "kv_size", "num_experts",
             "tie_word_embeddings")  # fmt: skip
    different = [
        f"{name} {there} instead of {here}"
        for name in names
        if (here := getattr(sizes, name)) is not None and (there := getattr(found, name)) != here
    ]
    if different:
        raise UsageError(
            f"{path} does not fit the model of the YAML: it has {', '.join(different)}. Use the YAML of this "
            "checkpoint's size and kind, dense or mixture of experts"
        )


def is_for_inference(path: Path) -> bool:
    """Whether safetensors say that they are cut for tensor parallelism, or have joined rows."""
    folders = rank_folders(path)[:1] or [path]
    files = [path] if path.is_file() else sorted(folders[0].glob("*.safetensors"))
    files = [file for file in files if file.suffix == ".safetensors"]
    if any(key in header for header in map(read_metadata, files) for key in (QKV_CONCAT, TENSOR_PARALLEL)):
        return True
    return any(is_joined(tensor.name for tensor in read_safetensors(file)) for file in files)


def rank_folders(path: Path) -> list[Path]:
    """The folders ``rank_0`` and so on in ``path``."""
    return [folder for folder in sorted(path.glob("rank_*/")) if re.fullmatch(r"rank_[0-9]+", folder.name)]


def _rank_of(folder: Path) -> int:
    return int(folder.name.removeprefix("rank_"))


def _recorded(tensors: list[StoredTensor]) -> dict[str, int]:
    """What the files' headers say of their layout; they must agree.

    Raises:
        UsageError: they do not, or say what is no number of ranks.
    """
    recorded: dict[str, int] = {}
    first = None
    for file in dict.fromkeys(tensor.file for tensor in tensors):
        header = read_metadata(file) if file.suffix == ".safetensors" else {}
        found = {key: header[key] for key in (QKV_CONCAT, TENSOR_PARALLEL) if key in header}
        if wrong := [
            f"{key} = {value!r}"
            for key, value in found.items()
            if not re.fullmatch("[1-9][0-9]*", str(value))
        ]:
            raise UsageError(f"{file} says {wrong[0]} in its header; expected a number of ranks")
        found = {key: int(value) for key, value in found.items()}
        if first is not None and found != recorded:
            raise UsageError(
                f"{first} and {file} say different things of their layout ({recorded or 'nothing'} and "
                f"{found or 'nothing'}); they are of different checkpoints"
            )
        first, recorded = file, found
    return recorded
