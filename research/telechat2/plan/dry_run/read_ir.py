"""Read MindSpore's text of a compiled graph: what a rank stores, computes and communicates in one step.

What is read is the dump after the pass ``validate``, the last of the front end: all communication stands in
it, with local shapes, and the graph is the one that the NPU would get. It holds, for each node::

      %6(name) = AllReduce(%5) {instance name: …} primitive_attrs: {…} cnode_attrs: {…} …
          : (<Tensor[Float16], (8, 64)>) -> (<Tensor[Float16], (8, 64)>)
          # Fullname with scope: (Default/network-Net/blocks-CellList/0-Two/row-Lin/AllReduce-op0)

Layers or micro-batches that MindSpore compiles once (``lazy_inline``) are functions of the graph; what
stands in them counts as often as they are called.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from research.telechat2.common.errors import UsageError
from research.telechat2.plan.dry_run.graph import Collective, Operator, ShardedParameter, TensorType

COLLECTIVES = (
    "AllReduce", "AllGather", "ReduceScatter", "AlltoAll", "AlltoAllV", "AllToAllv", "Broadcast",
    "NeighborExchange", "NeighborExchangeV2", "CollectiveScatter", "CollectiveGather", "Barrier", "Send",
    "Receive",
)  # fmt: skip
# The operators that do nearly all arithmetic, and those whose dtypes say how exact the model is.
OPERATORS = (
    "MatMul", "MatMulExt", "BatchMatMul", "BatchMatMulExt", "GroupedMatmul", "GroupedMatmulV4",
    "FlashAttentionScore", "FlashAttentionScoreGrad", "Softmax", "SoftmaxGrad", "LogSoftmax",
    "LogSoftmaxGrad", "RmsNorm", "RmsNormGrad", "Swiglu", "SwigluGrad", "SiLU", "SiLUGrad", "Mul", "Add",
    "Gather", "RotaryPositionEmbedding", "RotaryPositionEmbeddingGrad", "AdamWeightDecay", "AdamW",
    "FusedCastAdamWeightDecay",
)  # fmt: skip


Layouts = Mapping[str, Sequence[Any]]  # of parameters, as MindSpore gives them


class _Node(NamedTuple):
    subgraph: str
    kind: str
    text: str
    types: str
    scope: str


def read_graph(
    folder: Path, layouts: Layouts, rank: int
) -> tuple[tuple[ShardedParameter, ...], tuple[Collective, ...], tuple[Operator, ...]]:
    """The IR that MindSpore has dumped as rank ``rank``, in the order of execution within each function.

    Args:
        layouts: the compiled cell's ``parameter_layout_dict``.

    Raises:
        UsageError: there is no IR, or it is not written as this reader knows it: another MindSpore?
    """
    with open(_last_dump(folder), encoding="utf-8") as lines:
        entry = next(lines, "").partition("# IR entry: @")[2].strip()
        parameters = tuple(_parameters(lines, layouts))
        nodes = list(_nodes(lines))
    counts = _executions(nodes, entry)
    forward_scopes = {
        identity: node.scope
        for node in nodes
        if node.kind in COLLECTIVES and (identity := _attribute(node.text, "unique_id"))
    }
    collectives, operators = [], []
    for node in nodes:
        if node.kind in COLLECTIVES:
            found = _collective(node, rank, forward_scopes)
            collectives.append(replace(found, count=counts[node.subgraph]))
        elif node.kind in OPERATORS:
            operators.append(replace(_operator(node), count=counts[node.subgraph]))
    return parameters, tuple(collectives), tuple(operators)


def _last_dump(folder: Path) -> Path:
    dumps = sorted(folder.glob("*_validate_*.ir"), key=lambda path: int(path.stem.rpartition("_")[2]))
    if not dumps:
        raise UsageError(
            f"MindSpore left no IR of its pass 'validate' in {folder}; install the MindSpore that this "
            "project names in pyproject.toml."
        )
    return dumps[-1]


_PARAMETER = re.compile(r"%para\d+_(\S+): <Ref\[Tensor\[(\w+)\]\], \(([-\d, ]*)\), ref_key=")


def _parameters(lines: Iterator[str], layouts: Layouts) -> Iterator[ShardedParameter]:
    """The parameters in the head of the IR; leaves ``lines`` after them."""
    for line in lines:
        if line.startswith("Node counting information"):
            return
        if found := _PARAMETER.match(line):
            name, dtype, shape = found[1], found[2], _shape(found[3])
            default = ((), (), shape, None, None, "", shape)
            matrix, tensor_map, slice_shape, _, _, group, whole = layouts.get(name, default)[:7]
            yield ShardedParameter(
                name, dtype, tuple(whole), shape, tuple(slice_shape), tuple(matrix), tuple(tensor_map), group
            )


_SUBGRAPH = re.compile(r"subgraph @([^(]+)\(")
_NODE = re.compile(r"  %\d+\(.*?\) = (?:PrimFunc_)?([^(\s]+?)\(")
# ``call @f(…)``, ``%9[@@f](…)``, ``%9[@Partial(@f)](…)``, and of branches ``%9[@FuncUnion(@f, @g)](…)``
_CALL = re.compile(r"  %\d+\(.*?\) = (?:call (@[^(]+)\(|%\d+\[@(.*?)\]\()")
_FUNCTION = re.compile(r"@([^@(),\[\]\s]+)")
_SCOPE = "      # Fullname with scope: ("


def _nodes(lines: Iterator[str]) -> Iterator[_Node]:
    """Every node of every function of the graph."""
    subgraph: str | None = None
    text: str | None = None
    types: str | None = None
    for line in lines:
        if line.startswith("  %"):
            if text:
                raise UsageError(f"the IR is not written as expected: no scope follows {text.strip()[:200]}")
            text, types = line, None
        elif line.startswith("      : (") and types is None:  # a second such line has symbols of shapes
            types = line
        elif line.startswith(_SCOPE) and text:
            if subgraph is None or types is None:
                raise UsageError(f"the IR is not written as expected, near: {text.strip()[:200]}")
            found = _NODE.match(text)
            yield _Node(subgraph, found[1] if found else "", text, types, line[len(_SCOPE) : -2])
            text = None
        elif found := _SUBGRAPH.match(line):
            subgraph = found[1]


def _executions(nodes: list[_Node], entry: str) -> dict[str, int]:
    """How often each function of the graph runs per step; of branches, each as if it were taken.

    Raises:
        UsageError: a function runs in a loop, or nothing calls it in a way known here.
    """
    callers: dict[str, list[str]] = {}
    for node in nodes:
        if found := _CALL.match(node.text):
            for name in _FUNCTION.findall(found[1] or found[2]):
                callers.setdefault(name, []).append(node.subgraph)
    counts: dict[str, int | None] = {entry: 1}

    def count(name: str) -> int:
        if name not in counts and name in callers:
            counts[name] = None  # being counted
            counts[name] = sum(map(count, callers[name]))
        if (found := counts.get(name)) is None:
            why = "calls itself" if name in counts else "is called in no way that is known here"
            raise UsageError(f"the function {name} of the graph {why}, so how often it runs is unknown.")
        return found

    return {node.subgraph: count(node.subgraph) for node in nodes}


def _collective(node: _Node, rank: int, forward_scopes: dict[str, str]) -> Collective:
    inputs, outputs = _types(node.types)
    group = _attribute(node.text, "group") or ""
    ranks = _group_ranks(node, group)
    if node.kind == "Send":
        ranks = (rank, ranks[int(_required(node, "dest_rank"))])
    elif node.kind == "Receive":
        ranks = (ranks[int(_required(node, "src_rank"))], rank)
        inputs = outputs  # its operand only keeps the order
    parameter = _attribute(node.text, "mirror_user_id") or ""
    scope = forward_scopes.get(_attribute(node.text, "forward_unique_id") or "", node.scope)
    return Collective(
        kind=node.kind,
        group=group,
        ranks=ranks,
        input=inputs[0],
        output=outputs[0],
        phase=_phase(node),
        role=_role(node, parameter),
        scope=_cells(scope),
        parameter=parameter,
        micro_batch=_micro_batch(node.text),
    )


def _group_ranks(node: _Node, group: str) -> tuple[int, ...]:
    """The ranks of a group; of those that the model makes, the IR has all ranks and the name says which."""
    if name := re.fullmatch(r"experts-(\d+)-(\d+)-to-(\d+)", group):
        first, second, last = map(int, name.groups())
        return tuple(range(first, last + 1, second - first))
    return _shape(_attribute(node.text, "group_rank_ids") or _attribute(node.text, "rank_list") or "")


def _role(node: _Node, parameter: str) -> str:
    if node.kind in ("Send", "Receive"):
        return "pipeline"
    found = re.search(r"\{instance name: (\S*?)\}", node.text)
    instance = found[1] if found else ""
    if "mirror" in instance or instance.startswith("grad_parallel_optimizer"):
        return "gradient"
    if instance.startswith("parallel_optimizer"):
        return "weight"
    if "redistribution_op" in instance:
        return "redistribution"
    if "forward_op" in instance:
        return "operator"
    return "other"


def _operator(node: _Node) -> Operator:
    inputs, outputs = _types(node.types)
    return Operator(
        kind=node.kind,
        inputs=inputs,
        outputs=outputs,
        phase=_phase(node),
        scope=_cells(node.scope),
        micro_batch=_micro_batch(node.text),
    )


def _phase(node: _Node) -> str:
    """The scope ``recompute_Default`` is that of cells to be recomputed: also of their first computation."""
    if "duplicated: Bool(1)" in node.text:
        return "recompute"
    return "backward" if node.scope.startswith("Gradients") else "forward"


def _cells(scope: str) -> str:
    """``Gradients/Default/net-Net/layers-CellList/0-Layer/Grad_MatMul/MatMul-op0`` to ``net.layers.0``."""
    return ".".join(part.partition("-")[0] for part in scope.split("/")[:-1] if "-" in part)


def _micro_batch(text: str) -> int | None:
    micro_batch = _attribute(text, "micro")
    return None if micro_batch is None else int(micro_batch)


_VALUE = re.compile(r'"([^"]*)"|\(([^()]*)\)|\w+\(([^()]*)\)')


def _attribute(text: str, name: str) -> str | None:
    """The first attribute ``name`` of a node, without quotes, brackets and type."""
    start = text.find(f" {name}: ")
    if start < 0:
        start = text.find(f"{{{name}: ")
    if start < 0:
        return None
    found = _VALUE.match(text, start + len(name) + 3)
    return next((value for value in found.groups() if value is not None), None) if found else None


def _required(node: _Node, name: str) -> str:
    value = _attribute(node.text, name)
    if value is None:
        raise UsageError(f"the IR is not written as expected: {node.kind} has no {name}.")
    return value


_TENSOR = re.compile(
    r"<(?:Ref\[)?Tensor\[(\w+)\]\]?, \(([-\d, ]*)\)|<Tuple\[([^<>]*?)\], TupleShape\(([^<>]*?)\)[,>]"
)


def _types(text: str) -> tuple[tuple[TensorType, ...], tuple[TensorType, ...]]:
    """The tensors among a node's inputs and outputs; those of tuples one after the other."""
    inputs, _, outputs = text.partition(") -> (")
    return tuple(_tensors(inputs)), tuple(_tensors(outputs))


def _tensors(text: str) -> Iterator[TensorType]:
    for dtype, shape, dtypes, shapes in _TENSOR.findall(text):
        if dtype:
            yield TensorType(dtype, _shape(shape))
            continue
        names = [
            name
            for name, times in re.findall(r"Tensor\[(\w+)\](?:\*(\d+))?", dtypes)
            for _ in range(int(times or 1))
        ]
        for name, found in zip(names, re.findall(r"\(([-\d, ]*)\)", shapes), strict=False):
            yield TensorType(name, _shape(found))


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size.strip())
