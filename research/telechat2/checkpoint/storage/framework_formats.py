"""The two older formats, torch ``.bin`` and MindSpore ``.ckpt``, read and written by their frameworks.

That takes memory of up to twice the model's bytes (a ``.bin`` of a current torch is mapped instead of read).
The frameworks are imported only when such a file is met.
"""

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from research.telechat2.checkpoint.storage.tensor import Blocks, Shape, StoredTensor, blocks_of
from research.telechat2.common.errors import UsageError
from research.telechat2.common.placeholders import what_stands_here

Whole = tuple[str, str, Shape, bytearray]  # name, dtype, shape and bytes of a tensor in memory


def read_bin(file: Path) -> list[StoredTensor]:
    """The tensors of a ``torch.save`` file of a dictionary of tensors (and no code: ``weights_only``).

    UsageError if torch is not installed, or the file is broken or holds something else.
    """
    torch = _import_torch(file)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on protocols of pickles that are refused below
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        # torch's own text advises to load the file in spite of it
        found = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        what = found[1] if found else _unread_pickle(file)
        if what is None:
            raise _broken(file, "torch file", "a pickle that ends early") from None
        raise UsageError(
            f"{file} holds Python objects ({what}), whose loading could run code; expected tensors. Take "
            "the safetensors of this model, or have its author save the state_dict() alone"
        ) from None
    except Exception as error:  # a broken pickle can fail in any way
        raise _broken(file, "torch file", f"{type(error).__name__}: {error}") from None
    if not isinstance(content, dict) or not all(torch.is_tensor(tensor) for tensor in content.values()):
        raise UsageError(f"{file} holds no dictionary of tensors; save the model's state_dict() alone")
    return [_from_torch(torch, name, tensor, file) for name, tensor in content.items()]


def _broken(file: Path, what: str, reason: str) -> UsageError:
    reason = reason.partition("\n")[0]
    advice = f"Download or copy it again.{what_stands_here(file)}"
    return UsageError(f"{file} is not a complete {what} ({reason}). {advice}")


def _unread_pickle(file: Path) -> str | None:
    """What a file is that begins as a pickle and that torch reads nothing of; None if it is none."""
    with open(file, "rb") as stream:
        start = stream.read(2)
    # torch.save writes protocol 2; later ones spell the names of objects otherwise
    return f"a pickle of protocol {start[1]}" if start[:1] == b"\x80" and start[1:] > b"\x02" else None


def _from_torch(torch: Any, name: str, tensor: Any, file: Path) -> StoredTensor:
    def blocks(start: int = 0, stop: int | None = None) -> Blocks:
        return blocks_of(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data, start, stop)

    dtype = str(tensor.dtype).removeprefix("torch.")
    return StoredTensor(str(name), dtype, tuple(tensor.shape), file, blocks)


def write_bin(file: Path, tensors: Iterable[Whole]) -> None:
    """Write tensors as a dictionary with ``torch.save``."""
    torch = _import_torch(file)
    content = {}
    for name, dtype, shape, data in tensors:
        content[name] = torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(shape)
    torch.save(content, file)


def read_ckpt(file: Path) -> list[StoredTensor]:
    """The tensors of a MindSpore ``.ckpt`` file; UsageError if it is broken or holds something else."""
    import mindspore

    if not file.stat().st_size:
        raise _broken(file, "MindSpore checkpoint", "it is empty")
    try:
        content = mindspore.load_checkpoint(str(file))
    except Exception as error:  # so can a broken protobuf
        raise _broken(file, "MindSpore checkpoint", str(error)) from None
    return [_from_mindspore(name, value, file) for name, value in content.items()]


def _from_mindspore(name: str, value: Any, file: Path) -> StoredTensor:
    if isinstance(value, str):  # text that the training script stored beside the parameters
        return StoredTensor(name, "text", (), file, partial(blocks_of, value.encode()))
    array = np.ascontiguousarray(value.asnumpy())
    bits = array.view(np.uint16) if array.dtype.name == "bfloat16" else array
    return StoredTensor(name, array.dtype.name, tuple(value.shape), file, partial(blocks_of, bits.data))


def write_ckpt(file: Path, tensors: Iterable[Whole]) -> None:
    """Write tensors with ``mindspore.save_checkpoint``; ``file`` ends in ``.ckpt``."""
    import mindspore
    from mindspore.common.np_dtype import bfloat16

    parameters = []
    for name, dtype, shape, data in tensors:
        array = np.frombuffer(data, bfloat16 if dtype == "bfloat16" else dtype).reshape(shape)
        parameters.append({"name": name, "data": mindspore.Tensor(array)})
    mindspore.save_checkpoint(parameters, str(file))


def _import_torch(file: Path) -> Any:
    try:
        import torch
    except ImportError:
        raise UsageError(f"{file.name} is a torch file, but torch is absent: pip install torch") from None
    return torch
