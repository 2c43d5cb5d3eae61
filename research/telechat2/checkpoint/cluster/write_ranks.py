"""Write a cluster's slices, a folder for each rank: all of them or none."""

import os
from pathlib import Path

from tqdm import tqdm

from research.telechat2.checkpoint.job.copy import lay_out
from research.telechat2.checkpoint.job.journal import staging
from research.telechat2.checkpoint.job.output import require_room
from research.telechat2.checkpoint.storage.tensor import StoredTensor
from research.telechat2.common.files import fsync


def write_ranks(folder: Path, prefix: str, ranks: list[list[StoredTensor]]) -> int:
    """Write ``rank_<r>/<prefix><r>.safetensors`` for all ranks or none; returns the tensors' bytes.

    The files get their names when all are on the disk, that of rank 0 last.

    Raises:
        UsageError: too little room on the disk, or a target that appeared meanwhile.
    """
    outputs = []
    for rank, tensors in enumerate(ranks):
        weights = [(tensor, tensor.name) for tensor in tensors]
        outputs.append(lay_out(f"rank_{rank}/{prefix}{rank}.safetensors", weights, None, {"format": "ms"}))
    total = sum(output.size - len(output.head) for output in outputs)
    with staging(folder, str(os.getpid()), {}, resume=False) as stage:
        require_room(stage.path, total)
        with tqdm(total=total, unit="B", unit_scale=True, desc="transforming", disable=None) as progress:
            for output in outputs:
                file = stage.path / output.name
                file.parent.mkdir()
                with open(file, "xb") as stream:
                    stream.write(output.head)
                    for placed in output.tensors:
                        for block in placed.tensor.blocks():
                            progress.update(stream.write(block))
                fsync(file)
        stage.name_all([output.name for output in reversed(outputs)])
    return total
