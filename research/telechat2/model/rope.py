"""Rotary position tables, and what is done to them beyond the trained length."""

import math

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import constexpr
from mindspore.ops import operations as P  # noqa: N812

from research.telechat2.config.rope import (
    base_of_release,
    stretch_factor,
    stretched_base,
    trained_alpha,
    yarn_scale,
    yarn_settings,
)


def dynamic_ntk(length: int, base_seqlen: int, training_seqlen: int) -> tuple[int, float]:
    """Dynamic NTK's alpha and mscale for a sequence of ``length`` tokens (spec: model_family.md 1.2).

    With L = max(length, training_seqlen): trained_alpha of L, by which stretched_base grows, and
    ``mscale = 0.1 ln(L / training_seqlen) + 1``, by which cos and sin are multiplied.
    """
    length = max(length, training_seqlen)
    return trained_alpha(length, base_seqlen), 0.1 * math.log(length / training_seqlen) + 1


def inverse_frequencies(config, length: int | None = None) -> tuple[np.ndarray, float]:
    """Radians per position of each pair of channels ``[D/2]`` float64, and the factor of cos and sin.

    ``theta^(-2i/D)``, i < D/2, and by ``extend_method`` (spec 6.4, as MindFormers' FreqsMgr): "PI" and
    "linear" divide it by ``scaling_factor``, "NTK" multiplies theta by it, "YARN" divides that of slow
    channels, "DYNAMIC_NTK" takes dynamic_ntk's factors for ``length``, by default ``seq_length``. Theta is
    for all others the release's within its trained length, see base_of_release.
    """
    theta, width = base_of_release(config), config.head_dim
    exponents = -np.arange(0, width, 2, dtype=np.float64) / width
    method = config.extend_method
    if method in ("PI", "linear"):
        return theta**exponents / stretch_factor(config), 1.0
    if method == "NTK":
        return (theta * stretch_factor(config)) ** exponents, 1.0
    if method == "YARN":
        return _yarn(yarn_settings(config), theta, exponents)
    if method == "DYNAMIC_NTK":
        length = config.seq_length if length is None else length
        _, mscale = dynamic_ntk(length, config.base_seqlen, config.training_seqlen)
        length = max(length, config.training_seqlen)
        return stretched_base(float(config.theta), config.base_seqlen, length, width) ** exponents, mscale
    return theta**exponents, 1.0


def _yarn(settings: dict, theta: float, exponents: np.ndarray) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, sections 3.2 and 3.4).

    A pair of more than ``beta_fast`` rotations over the trained length stays, one of fewer than ``beta_slow``
    is divided by ``factor``; between the two it goes linearly with the pair's index.
    """
    pairs, factor = len(exponents), settings["factor"]

    def pair_of(rotations: float) -> float:
        wavelength = settings["original_max_position_embeddings"] / rotations
        return pairs * math.log(wavelength / (2 * math.pi)) / math.log(theta)

    low = max(math.floor(pair_of(settings["beta_fast"])), 0)
    high = min(math.ceil(pair_of(settings["beta_slow"])), 2 * pairs - 1)
    slow = np.clip((np.arange(pairs) - low) / max(high - low, 0.001), 0.0, 1.0)
    return theta**exponents * (1 - slow + slow / factor), yarn_scale(settings)


def _write(cos: np.ndarray, sin: np.ndarray, frequencies: np.ndarray, scale: float) -> None:
    """Fill fp32 ``[length, D]`` tables in place, some thousand positions at a time: angles are float64."""
    pairs = len(frequencies)
    for first in range(0, len(cos), 4096):
        rows = slice(first, first + 4096)
        angles = np.outer(np.arange(len(cos))[rows], frequencies)
        for table, function in ((cos, np.cos), (sin, np.sin)):
            table[rows, :pairs] = table[rows, pairs:] = function(angles) * scale


def rotary_tables(config, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every position's angles, fp32 ``[length, head_dim]``, the second half as the first.

    ``angle(t, i) = t * inverse_frequencies(config)[i]``, computed in float64; with DYNAMIC_NTK those of a
    sequence of ``length`` tokens, at most ``seq_length``: an evaluation record has one more.
    """
    cos, sin = np.empty((2, length, config.head_dim), np.float32)
    _write(cos, sin, *inverse_frequencies(config, min(length, config.seq_length)))
    return cos, sin


class RotaryTables(nn.Cell):
    """The tables of a model, cut or gathered to what a step needs, in ``rotary_dtype``.

    An evaluation record is read whole, so they cover ``seq_length + 1`` positions. With DYNAMIC_NTK a whole
    sequence has the factor of its own length, as in the torch release. In prediction, where requests of
    unlike lengths have unlike factors, there is a table for each alpha that occurs up to ``seq_length``, one
    after the other, in float32: ``alphas * (seq_length + 1) * head_dim * 8`` bytes, 34 MB for 16K tokens of a
    model trained at 8K with head_dim 128, and 101 MB for 32K.
    """

    def __init__(self, config):
        super().__init__()
        self.dtype = config.rotary_dtype
        dynamic = config.extend_method == "DYNAMIC_NTK"
        self.by_request = config.use_past and dynamic
        if self.by_request:
            cos, sin = self._stack(config)
            self.cos, self.sin = Tensor.from_numpy(cos), Tensor.from_numpy(sin)  # no second copy
        elif not dynamic:
            cos, sin = rotary_tables(config, config.seq_length + 1)
            self.cos, self.sin = Tensor(cos, self.dtype), Tensor(sin, self.dtype)
        self.gather = P.Gather()
        self.gather_factor = P.Gather()
        self.add = P.Add()
        self.mul = P.Mul()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        # Constants of the graph, so that no plan has to split or send them.
        self.first = constexpr(
            (lambda length: self._of_length(config, length))
            if dynamic
            else (lambda length: (self.cos[:length], self.sin[:length]))
        )

    def _stack(self, config):
        """The tables of all alphas, and for every length up to ``seq_length`` the first row of its own."""
        rows = config.seq_length + 1
        factors = [dynamic_ntk(n, config.base_seqlen, config.training_seqlen) for n in range(rows)]
        longest = {alpha: length for length, (alpha, _) in enumerate(factors)}
        order = {alpha: index for index, alpha in enumerate(longest)}
        tables = np.empty((2, len(order), rows, config.head_dim), np.float32)
        for alpha, index in order.items():
            _write(*tables[:, index], inverse_frequencies(config, longest[alpha])[0], 1.0)
        self.first_rows = Tensor(np.array([order[alpha] * rows for alpha, _ in factors], np.int32))
        self.scales = Tensor(np.array([mscale for _, mscale in factors], np.float32))
        return tables.reshape(2, -1, config.head_dim)

    def _of_length(self, config, length):
        return tuple(Tensor(table, self.dtype) for table in rotary_tables(config, length))

    def sequence(self, length):
        """Tables ``[length, D]`` of positions 0 to length - 1."""
        return self.first(length)

    def tokens(self, positions, lengths=None):
        """Tables ``[T, D]`` of the positions ``[T]``.

        ``lengths`` ``[T]`` int32, with DYNAMIC_NTK alone: the length whose factor each token's request has.
        """
        if not self.by_request:
            return self.gather(self.cos, positions, 0), self.gather(self.sin, positions, 0)
        rows = self.add(positions, self.gather_factor(self.first_rows, lengths, 0))
        scales = self.reshape(self.gather_factor(self.scales, lengths, 0), (-1, 1))
        cos = self.mul(self.gather(self.cos, rows, 0), scales)
        sin = self.mul(self.gather(self.sin, rows, 0), scales)
        return self.cast(cos, self.dtype), self.cast(sin, self.dtype)
