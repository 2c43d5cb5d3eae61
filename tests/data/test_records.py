"""Records of other programs: what would train without a word is found, with file and record."""

import numpy as np
import pytest
from refusal import refused

from research.telechat2.data.records import Row, Rules, check_records
from research.telechat2.run.records import MAX_FILES, MAX_IDS, MAX_RECORDS, sample
from research.telechat2.run.steps import check_steps

LENGTH, VOCABULARY, IGNORED = 16, 100, -100
RULES = Rules(LENGTH, VOCABULARY)


def record(seed: int = 0, trained=slice(8, 12)):
    ids = np.random.default_rng(seed).integers(4, VOCABULARY, LENGTH + 1).astype(np.int32)
    labels = np.full_like(ids, IGNORED)
    labels[trained] = ids[trained]
    return ids, labels


def check(*records, rules=RULES):
    return check_records([Row("d.mindrecord", n, *row) for n, row in enumerate(records)], rules)


def second(change, rules=RULES) -> None:
    """Check a good record and a second one that ``change(ids, labels)`` makes of another good one."""
    check(record(0), change(*record(1)), rules=rules)


def test_good_records_are_counted():
    seen = check(record(0), record(1), record(2, slice(0, 0)))
    assert (seen.records, seen.length, seen.untrained) == (3, LENGTH + 1, 1)
    assert seen.first_untrained == "d.mindrecord, record 2"
    short = [tuple(column[:9] for column in record(seed, slice(4, 8))) for seed in (0, 1)]
    assert check(*short).length == 9
    assert check(*short, rules=Rules(None, None)).records == 2
    everything = tuple(column.astype(np.int64) for column in record(0, slice(0, None)))
    assert check(everything).untrained == 0


@pytest.mark.parametrize("trained", [slice(8, 12), slice(0, None), slice(16, 17), slice(5, 6)])
@pytest.mark.parametrize("with_the_last", [True, False])
def test_labels_that_are_moved_already_are_named(trained, with_the_last):
    """As Megatron stores them: input_ids without the last id, labels without the first."""
    ids, labels = record(1, trained)
    ids, labels = ids[:-1], labels[1:].copy()
    if not with_the_last:
        labels[-1] = IGNORED
        if trained == slice(16, 17):
            return
    if trained == slice(16, 17):  # the id that it is moved from is not in the record
        with refused("record 1", "label"):
            check(tuple(column[:-1] for column in record(0)), (ids, labels))
        return
    with refused("record 1", "next"):
        check(tuple(column[:-1] for column in record(0)), (ids, labels))


def test_labels_moved_the_other_way_are_named():
    with refused("record 1", "previous"):
        second(lambda ids, labels: (ids[1:], labels[:-1]), rules=RULES._replace(one_length=False))


def padded(count: int, pad: int, is_trained: bool):
    ids, labels = record(1, slice(0, None))
    ids[len(ids) - count :] = pad
    labels[len(ids) - count :] = pad if is_trained else IGNORED
    return ids, labels


@pytest.mark.parametrize("pad", [3, 0])
def test_trained_padding_is_named(pad):
    """``labels = input_ids.copy()`` before the padding was masked."""
    rules = RULES._replace(pad=pad)
    for count in (3, 9, 17):
        with refused("record 1", f"last {min(count, 16)} ids are {pad}", "pad_token_id"):
            check(record(0), padded(count, pad, True), rules=rules)
        assert check(record(0), padded(count, pad, False), rules=rules).records == 2
    assert check(record(0), padded(2, pad, True), rules=rules).records == 2  # an end that is the pad id
    inside = record(1, slice(0, None))
    inside[0][4:9] = inside[1][4:9] = pad
    assert check(record(0), inside, rules=rules).records == 2


def set_at(position, value, column):
    def change(ids, labels):
        (ids if column == "ids" else labels)[position] = value
        return ids, labels

    return change


@pytest.mark.parametrize(
    ("change", "values"),
    [
        (set_at(5, VOCABULARY, "ids"), ["record 1", "id 100", "position 5", 101]),
        (set_at(16, -1, "ids"), ["record 1", "id -1", "position 16"]),
        (set_at(9, 5000, "labels"), ["record 1", "label 5000", "position 9"]),
        (lambda a, b: (a, np.where(b == IGNORED, 0, b)), ["--model.model_config.ignore_token_id 0"]),
        (lambda a, b: (a, np.where(b == IGNORED, -1, b)), ["--model.model_config.ignore_token_id -1"]),
        (lambda a, b: (a[:10], b[:10]), ["record 1", "10 ids", 17]),
        (lambda a, b: (np.append(a, 4), np.append(b, 4)), ["18 ids", "seq_length is 16"]),
        (lambda a, b: (a, b[:-1]), ["record 1", "17 input_ids", "16 labels"]),
        (lambda a, b: (a.astype(np.float32), b), ["record 1", "input_ids", "float32"]),
        (lambda a, b: (a, b[None]), ["record 1", "labels", "int32", "[1, 17]"]),
        (lambda a, b: (a[::-1].copy(), b), ["3 differ"]),
    ],
)
def test_what_would_train_without_a_word_is_named(change, values):
    with refused(*values):
        second(change)


def test_data_of_which_nothing_is_trained_are_refused():
    only_the_first = record(1, slice(0, 1))  # nothing stands before it
    with refused(2, IGNORED):
        check(record(0, slice(0, 0)), only_the_first)
    check(record(0, slice(0, 0)), only_the_first, record(2))


def test_without_labels_padding_is_not_trained():
    ids = record(0)[0]
    assert check((ids, None), (np.full_like(ids, 3), None)).untrained == 1
    with refused(1, IGNORED):
        check((np.full_like(ids, 7), None), rules=RULES._replace(pad=7))


def test_another_mark_of_what_is_not_trained_is_taken_from_the_settings():
    ids, labels = record(0)
    check((ids, np.where(labels == IGNORED, -1, labels)), rules=RULES._replace(ignored=-1))


def test_documents_are_counted_by_their_first_ids():
    ids, labels = record(0)
    ids[[3, 7]] = 1
    labels = np.where(labels == IGNORED, labels, ids)
    assert check((ids, labels), rules=RULES._replace(start_ids=(1,))).documents == 3


def test_many_records_are_sampled_evenly_from_first_to_last():
    assert sample([3, 2], 513) == [[0, 1, 2], [0, 1]]
    big = sample([10**6, 500_000], 513)
    assert sum(map(len, big)) == MAX_RECORDS and big[0][0] == 0 and big[1][-1] == 499_999
    assert len(big[0]) == pytest.approx(2 * len(big[1]), rel=0.01)
    long = sample([10**6], 32_769)
    assert len(long[0]) == MAX_IDS // 32_769
    many = sample([10] * 1000, 10)
    assert sum(bool(numbers) for numbers in many) == MAX_FILES and many[0] and many[-1]
    assert sample([4, 0, 1], 10) == [[0, 1, 2, 3], [], [0]]


def run_of(batch_size=2, **changes) -> dict:
    return {"runner_config": {"batch_size": batch_size}, "train_dataset": {"data_loader": {}}} | changes


def test_a_step_needs_its_records():
    assert check_steps(run_of(), 2) == []
    with refused("1 record", 2, "--batch_size"):
        check_steps(run_of(), 1)
    few = {"data_loader": {"num_samples": 1}}
    with refused("1 record"):
        check_steps(run_of(train_dataset=few), 100)
    cluster = {
        "use_parallel": True,
        "parallel_config": {"data_parallel": 8, "pipeline_stage": 2, "micro_batch_num": 4},
    }
    with refused("63 records", 64, "batch_size 2 x 32"):
        check_steps(run_of(**cluster), 63)
    assert check_steps(run_of(**cluster), 64) == []


def test_what_an_epoch_leaves_out_is_told(monkeypatch):
    (note,) = check_steps(run_of(), 5)
    assert note.startswith("1 record of 5 not trained in each epoch (others each time, by shuffle): 2 steps")
    (note,) = check_steps(run_of(train_dataset={"data_loader": {"shuffle": False}}), 5)
    assert "always the last ones" in note
    whole = {"drop_remainder": False, "data_loader": {}}
    assert check_steps(run_of(train_dataset=whole), 5) == [
        "the last step of each epoch takes 1 record, as drop_remainder is False"
    ]
    assert check_steps(run_of(train_dataset=whole), 1) == [
        "the last step of each epoch takes 1 record, as drop_remainder is False"
    ]
    cluster = {"use_parallel": True, "parallel_config": {"data_parallel": 4}}
    with refused("drop_remainder", 2):
        check_steps(run_of(train_dataset=whole, **cluster), 10)
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    copies = {"use_parallel": True, "parallel": {"parallel_mode": 0}}
    assert check_steps(run_of(1, **copies), 5) == [
        "1 record of 5 twice in each epoch, as 2 processes read equally many"
    ]
