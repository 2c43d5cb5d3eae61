"""What a record must be, wherever it comes from: ids of the vocabulary, and labels that are the ids.

The model moves the labels by one itself. Records of other programs may hold them moved already, mark what is
not trained by another number, or belong to another vocabulary: all of that trains without a word.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from research.telechat2.common.errors import UsageError
from research.telechat2.data.writing import count_documents

_LEAST_PADDING = 3  # one or two may end a text, where padding and end share an id
_PREPARE = "prepare the data with telechat_preprocess.py"


_Ids = npt.NDArray[np.integer[Any]]


class Row(NamedTuple):
    """A record: ``number`` counts from 0 within ``file``; labels None where the data has none."""

    file: str
    number: int
    input_ids: _Ids
    labels: _Ids | None


class Rules(NamedTuple):
    """What the model takes; None: not known.

    ``ignored``: the label of a token that is not trained. ``pad``: the id that is not trained without labels.
    ``one_length``: whether all records must be equally long. ``start_ids``: of which documents are counted.
    """

    seq_length: int | None
    vocab_size: int | None
    ignored: int = -100
    pad: int = 3
    one_length: bool = True
    start_ids: tuple[int, ...] = ()


@dataclass
class Seen:
    """What the records were: how many, their ids, those without any trained token, documents at most."""

    records: int = 0
    length: int = 0
    untrained: int = 0
    first_untrained: str = ""
    documents: int = 0


def check_records(rows: Iterable[Row], rules: Rules) -> Seen:
    """Look through records. UsageError where one breaks a rule, or none has a trained token."""
    seen = Seen()
    for row in rows:
        where = f"{row.file}, record {row.number}"
        _check_form(where, row)
        length = len(row.input_ids)
        _check_length(row, where, length, seen, rules)
        _check_ids(where, row.input_ids, rules.vocab_size)
        seen.records, seen.length = seen.records + 1, max(length, seen.length)
        if rules.start_ids:
            seen.documents = max(seen.documents, count_documents(row.input_ids, rules.start_ids))
        if not _trained(where, row, rules):
            seen.untrained += 1
            seen.first_untrained = seen.first_untrained or where
    if seen.records and seen.untrained == seen.records:
        found = f"no label of the {seen.records:,} records read is trained (first: {seen.first_untrained})"
        raise UsageError(f"{found}: all are {rules.ignored}, ignore_token_id; {_PREPARE}.")
    return seen


def _check_form(where: str, row: Row) -> None:
    for name, values in (("input_ids", row.input_ids), ("labels", row.labels)):
        if values is None:
            continue
        if values.ndim != 1 or values.dtype.kind not in "iu":
            found = f"{where}: {name} is {values.dtype} of shape {list(values.shape)}"
            raise UsageError(f"{found}, expected one row of integers, int32 [seq_length + 1]; {_PREPARE}.")
    if row.labels is not None and len(row.labels) != len(row.input_ids):
        found = f"{len(row.input_ids)} input_ids, but {len(row.labels)} labels"
        raise UsageError(f"{where}: {found}; each id needs one: {_PREPARE}.")


def _check_length(row: Row, where: str, length: int, seen: Seen, rules: Rules) -> None:
    if rules.seq_length is not None and length - 1 > rules.seq_length:
        raise UsageError(too_long(row.file, length - 1, rules.seq_length))
    if length < 2:
        raise UsageError(f"{where}: {length} ids, but a record needs two, one to read and one to predict.")
    if rules.one_length and seen.records and length != seen.length:
        remedy = f"fill the shorter ones with the pad id and the label {rules.ignored}, or {_PREPARE}"
        raise UsageError(f"{where}: {length} ids, but the records before it have {seen.length}; {remedy}.")


def _check_ids(where: str, ids: _Ids, vocab_size: int | None) -> None:
    if ids.min() < 0:
        position = int(ids.argmin())
        found = f"{where}: id {ids[position]} at position {position} is no token"
        raise UsageError(f"{found}; only labels may be negative: fill input_ids with the pad id.")
    if vocab_size is not None and ids.max() >= vocab_size:
        position = int(ids.argmax())
        found = f"{where}: id {ids[position]} at position {position}"
        raise UsageError(too_many_tokens(found, int(ids[position]) + 1, vocab_size))


def too_long(file: object, tokens: int, seq_length: int) -> str:
    """The message about records of more tokens than the model takes."""
    remedy = f"prepare with --max_length {seq_length}, or set --model.model_config.seq_length {tokens}"
    return f"{file} holds records of {tokens + 1} ids, but the model's seq_length is {seq_length}: {remedy}."


def too_many_tokens(what: str, needed: int, vocab_size: int) -> str:
    """The message about data of a larger vocabulary than the model has."""
    remedy = "prepare the data with this model's tokenizer.model, or use the YAML of the data's model"
    return f"{what} needs a vocabulary of {needed} tokens, but vocab_size is {vocab_size}: {remedy}."


def _trained(where: str, row: Row, rules: Rules) -> int:
    """How many tokens of a record are trained; the first never is, as nothing stands before it."""
    ids, labels = row.input_ids, row.labels
    if labels is None:
        return int((ids[1:] != rules.pad).sum())
    trained = labels != rules.ignored
    trained[0] = False
    wrong = np.flatnonzero(trained & (labels != ids))
    if len(wrong):
        raise UsageError(f"{where}: {_wrong_labels(ids, labels, trained, wrong, rules.ignored)}")
    other = np.flatnonzero(~trained | (ids != rules.pad))
    padding = len(ids) - 1 - int(other[-1])  # the first token is not trained, so there is one
    if padding >= _LEAST_PADDING:
        remedy = (
            f"label them {rules.ignored}, or, if this id is text, correct --model.model_config.pad_token_id"
        )
        raise UsageError(
            f"{where}: the last {padding} ids are {rules.pad}, the pad id, but trained: {remedy}."
        )
    return int(trained.sum())


def _wrong_labels(
    ids: _Ids, labels: _Ids, trained: npt.NDArray[np.bool_], wrong: npt.NDArray[np.intp], ignored: int
) -> str:
    """Why labels that are not the ids are wrong, with the remedy."""
    for moved, fits in (
        ("next", (labels[:-1] == ids[1:])[trained[:-1]]),
        ("previous", (labels[1:] == ids[:-1])[trained[1:]]),
    ):
        if len(fits) and fits.all():
            expected = f"give labels[i] = input_ids[i] where i is trained, else {ignored}"
            return f"each label is the {moved} id, but the model itself moves labels by one: {expected}."
    position = int(wrong[0])
    found = f"label {labels[position]} at position {position}, where input_ids has {ids[position]}"
    found += f": a label is the id itself where it is trained, else {ignored} (ignore_token_id)."
    mark, *others = np.unique(labels[wrong])
    if not others and len(wrong) > 1:
        return f"{found} If {mark} means not trained, set --model.model_config.ignore_token_id {mark}."
    return f"{found} In this record {len(wrong):,} differ. Correct them, or {_PREPARE}."
