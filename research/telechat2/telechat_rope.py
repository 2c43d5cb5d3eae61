"""Rotary position tables, and what is done to them beyond the trained length."""

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import constexpr
from mindspore.ops import operations as P  # noqa: N812


def rotary_tables(config, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every position's angles, fp32 ``[length, head_dim]``, the second half as the first.

    ``angle(t, i) = t * theta^(-2i/head_dim)``, i < head_dim/2. "PI" divides t by ``scaling_factor``,
    "NTK" multiplies theta by it (spec 6.4, as MindFormers' FreqsMgr). Computed in float64.
    """
    theta, scale = float(config.theta), 1.0
    if config.extend_method == "PI":
        scale = 1.0 / config.scaling_factor
    elif config.extend_method == "NTK":
        theta *= config.scaling_factor
    inverse_frequency = theta ** (-np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim)
    angles = np.outer(np.arange(length, dtype=np.float64) * scale, inverse_frequency)
    angles = np.concatenate((angles, angles), axis=-1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


class RotaryTables(nn.Cell):
    """The tables of a model, cut or gathered to what a step needs, in ``rotary_dtype``.

    An evaluation record is read whole, so they cover ``seq_length + 1`` positions.
    """

    def __init__(self, config):
        super().__init__()
        cos, sin = rotary_tables(config, config.seq_length + 1)
        self.cos = Tensor(cos, config.rotary_dtype)
        self.sin = Tensor(sin, config.rotary_dtype)
        self.gather = P.Gather()
        # Constants of the graph, so that no plan has to split or send them.
        self.first = constexpr(lambda length: (self.cos[:length], self.sin[:length]))

    def sequence(self, length):
        """Tables ``[length, D]`` of positions 0 to length - 1."""
        return self.first(length)

    def tokens(self, positions):
        """Tables ``[T, D]`` of the positions ``[T]``."""
        return self.gather(self.cos, positions, 0), self.gather(self.sin, positions, 0)
