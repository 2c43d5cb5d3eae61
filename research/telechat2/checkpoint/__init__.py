"""Checkpoints: one table of names and shapes, streamed in either direction (torch <-> MindSpore)."""

from research.telechat2.checkpoint.convert import (
    convert_to_mindspore,
    convert_to_torch,
    read_mindspore_tensors,
)
from research.telechat2.checkpoint.sizes import TelechatSizes

__all__ = ["TelechatSizes", "convert_to_mindspore", "convert_to_torch", "read_mindspore_tensors"]
