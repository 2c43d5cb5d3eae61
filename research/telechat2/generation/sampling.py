"""Which token comes next: the likeliest, or one drawn from what the settings leave of the distribution.

The rules and their order are those of transformers: repetition penalty, smallest length, temperature, top-k,
top-p. MindFormers' own top-p drops the token that crosses the threshold, at 1.0 too, so that its top-k 2 is
greedy. Everything is computed row by row in float64, and each row draws from its own random numbers: an
answer depends neither on its neighbours in a batch nor on the number of rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from research.telechat2.common.errors import UsageError
from research.telechat2.config.sampling import NEUTRAL, SAMPLING, check_sampling

_HEAD = 1024  # likeliest tokens that most often have the share of top-p


@dataclass(frozen=True)
class Sampling:
    """Settings of one call of ``generate``, checked.

    ``do_sample``: draw, else take the likeliest. ``temperature``: divides the logits. ``top_k``: the k
    likeliest tokens, and those as likely as the last of them. ``top_p``: the fewest likeliest tokens whose
    probabilities reach it, counted after ``top_k``. ``repetition_penalty``: divides positive and multiplies
    negative logits of tokens that prompt or answer already hold. ``min_length``, ``min_new_tokens``: tokens
    of a row, of its answer, before which none of ``end_tokens`` may come.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    min_length: int = 0
    min_new_tokens: int = 0
    end_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        check_sampling(vars(self))

    @classmethod
    def of(cls, settings) -> "Sampling":
        """Those of an object with the names of MindFormers' GenerationConfig; None there is off."""
        given = {name: getattr(settings, name) for name in SAMPLING}
        given = {name: NEUTRAL.get(name, False) if value is None else value for name, value in given.items()}
        smallest = {name: getattr(settings, name) or 0 for name in ("min_length", "min_new_tokens")}
        return cls(**given, **smallest, end_tokens=tuple(settings.eos_token_id or ()))

    @property
    def is_argmax(self) -> bool:
        """Whether the next token is the largest logit, untouched."""
        unchanged = self.repetition_penalty == NEUTRAL["repetition_penalty"]
        return not self.do_sample and unchanged and not (self.min_length or self.min_new_tokens)


def check_finite(logits: np.ndarray, step: int, position: int, row: int = 0, rows: int = 1) -> None:
    """UsageError for logits ``[V]`` with NaN or infinite values; ``step``: the answer's token, from 1."""
    if np.isfinite(logits.min()) and np.isfinite(logits.max()):  # NaN passes through both
        return
    where = f" of row {row + 1} of {rows}" if rows > 1 else ""
    raise UsageError(
        f"logits are not finite: for token {step} of the answer{where} (position {position}), "
        f"{np.isnan(logits).sum()} of {len(logits)} are NaN and {np.isinf(logits).sum()} infinite. Check the "
        f"weights for such values, or set compute_dtype and res_dtype to bfloat16 or float32."
    )


def next_token(
    logits: np.ndarray,
    tokens: np.ndarray,
    prompt_length: int,
    sampling: Sampling,
    random: np.random.Generator | None,
    more: Callable[[np.ndarray], np.ndarray] | None = None,
) -> tuple[int, np.ndarray]:
    """The next token of one row, and the scores that it was chosen by, ``[V]``; a drawn one's are at most 0.

    ``logits``: ``[V]`` of the row's last token. ``tokens``: ids of prompt and answer so far. ``random`` is
    used where ``do_sample`` is True. ``more`` changes scores ``[V]`` between the penalties and temperature.
    """
    if sampling.is_argmax and more is None:
        return int(np.argmax(logits)), logits
    scores = _penalized(logits.astype(np.float64), tokens, sampling.repetition_penalty)
    if len(tokens) - prompt_length < sampling.min_new_tokens or len(tokens) < sampling.min_length:
        scores[list(sampling.end_tokens)] = -np.inf
    if more is not None:
        scores = more(scores)
    if not sampling.do_sample:
        return int(np.argmax(scores)), scores
    with np.errstate(over="ignore"):  # relative to the largest, an overflow is a probability of 0
        scores = (scores - scores.max()) / sampling.temperature
    scores = top_p(top_k(scores, sampling.top_k), sampling.top_p)
    return draw(scores, random), scores


def _penalized(scores: np.ndarray, tokens: np.ndarray, penalty: float) -> np.ndarray:
    """``scores`` ``[V]`` where those of ``tokens`` are divided by ``penalty``, or multiplied if negative."""
    if penalty == 1.0:
        return scores
    scores, seen = scores.copy(), np.unique(tokens)
    found = scores[seen]
    scores[seen] = np.where(found < 0, found * penalty, found / penalty)
    return scores


def top_k(scores: np.ndarray, count: int) -> np.ndarray:
    """``scores`` ``[V]`` with -inf for all below the ``count``-th largest; 0 keeps all."""
    if not 0 < count < len(scores):
        return scores
    least = np.partition(scores, -count)[-count]
    return np.where(scores < least, -np.inf, scores)


def top_p(scores: np.ndarray, share: float) -> np.ndarray:
    """``scores`` ``[V]`` with -inf for all but the fewest likeliest tokens that have ``share`` together.

    Of tokens equally likely the lower ids stay.
    """
    if share >= 1.0:
        return scores
    ids = np.flatnonzero(scores > -np.inf)
    shares = np.exp(scores[ids] - scores[ids].max())
    wanted = share * shares.sum()
    if len(ids) > _HEAD:  # to sort a whole vocabulary takes most of a step
        least = np.partition(shares, -_HEAD)[-_HEAD]
        if shares[shares >= least].sum() >= wanted:
            ids, shares = ids[shares >= least], shares[shares >= least]
    order = np.argsort(-shares, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(shares[order])[:-1]])
    kept = ids[order[before < wanted]]
    filtered = np.full_like(scores, -np.inf)
    filtered[kept] = scores[kept]
    return filtered


def draw(scores: np.ndarray, random: np.random.Generator) -> int:
    """A token, drawn by the softmax of ``scores`` ``[V]``; -inf is never drawn."""
    kept = np.flatnonzero(scores > -np.inf)
    cumulated = np.cumsum(np.exp(scores[kept] - scores[kept].max()))
    drawn = min(random.random() * cumulated[-1], np.nextafter(cumulated[-1], 0))
    return int(kept[np.searchsorted(cumulated, drawn, side="right")])


def row_generators(rows: int, seed: int | None) -> list[np.random.Generator]:
    """Random numbers for each row of a batch, begun at ``seed``, or where NumPy's global ones are.

    The global ones, which mindspore.set_seed sets in every process, advance by one number a row: rows asked
    in batches of any size draw the same.
    """
    integers = np.random.randint if seed is None else np.random.default_rng(seed).integers
    return [np.random.default_rng(int(number)) for number in integers(2**31, size=rows)]
