"""An Atlas 800T A2 by its data sheet: eight Ascend 910B, each linked to the seven others.

The peak is the 910B3's; the links are seven of HCCS with 56 GB/s each, both directions together, and one of
200 Gbit/s Ethernet from each NPU to other nodes.
"""

from research.telechat2.plan.communication import ALL_REDUCE, ALL_TO_ALL, SEND, Communication

NODE = 8  # NPUs
PEAK = 313e12  # operations a second in bfloat16
MEMORY = 1.6e12  # bytes a second
HCCS_LINK = 28e9  # bytes a second and direction between two NPUs of a node
ROCE = 25e9  # bytes a second and direction from one NPU to other nodes


def link_seconds(item: Communication) -> float:
    """Of a collective at the links' full bandwidth, first across nodes and then within them.

    Ranks of a node use all links between them at once; across nodes each NPU has its own.
    """
    inside = max(min(item.ranks, NODE // item.stride), 1)
    nodes = item.ranks // inside
    if item.kind == SEND:
        return item.bytes / (HCCS_LINK if inside > 1 else ROCE)
    if item.kind == ALL_TO_ALL:
        each = item.tensor_bytes * item.count / item.ranks
        return max(each / HCCS_LINK if inside > 1 else 0.0, each * (item.ranks - inside) / ROCE)
    part = item.tensor_bytes * item.count / inside
    once = (part / HCCS_LINK if inside > 1 else 0.0) + part * (nodes - 1) / nodes / ROCE
    return once * (2 if item.kind == ALL_REDUCE else 1)
