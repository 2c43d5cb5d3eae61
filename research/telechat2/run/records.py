"""Records before a run: a bounded look at what they hold, and how many of them an epoch trains."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from research.telechat2.common.errors import UsageError
from research.telechat2.data.records import Row
from research.telechat2.run.training_record import (
    count_records,
    device_num,
    global_batch_size,
    is_data_parallel,
    steps_per_epoch,
)

# At most so much is read before a run, which takes two seconds or three: evenly spaced records.
MAX_RECORDS = 10_000
MAX_IDS = 2**24
MAX_FILES = 100
COLUMNS = ("input_ids", "labels")


def sample(counts: list[int], length: int) -> list[list[int]]:
    """The records to read of each file: all, or evenly spaced ones, the first and the last among them.

    Args:
        counts: records of each file.
        length: ids of a record.
    """
    total = sum(counts)
    most = min(total, MAX_RECORDS, max(MAX_IDS // max(length, 1), 1))
    chosen = (
        np.unique(np.linspace(0, max(total - 1, 0), most).round().astype(int)) if total else np.array([], int)
    )
    starts = np.cumsum([0, *counts])
    found = [
        (chosen[(chosen >= start) & (chosen < end)] - start).tolist()
        for start, end in zip(starts, starts[1:], strict=False)
    ]
    opened = set(np.linspace(0, len(counts) - 1, min(len(counts), MAX_FILES)).round().astype(int).tolist())
    return [numbers if place in opened else [] for place, numbers in enumerate(found)]


def read_rows(files: list[Path], columns: tuple[str, ...]) -> tuple[Iterator[Row], int]:
    """The records of ``sample``, read as they come, and how many records there are.

    Raises:
        UsageError: a file is not readable, or lacks a column.
    """
    counts = [count_records([file]) or 0 for file in files]
    first = next(_read(files[0], columns, [0]), None)
    if first is None:
        raise UsageError(_unreadable(files[0]))
    chosen = sample(counts, len(np.atleast_1d(first.input_ids)))
    rows = (row for file, numbers in zip(files, chosen, strict=True) for row in _read(file, columns, numbers))
    return rows, sum(counts)


def _read(file: Path, columns: tuple[str, ...], numbers: list[int]) -> Iterator[Row]:
    if not numbers:
        return
    import mindspore.dataset as ds

    try:
        found = ds.MindDataset([str(file)], shuffle=False).get_col_names()
        if missing := [name for name in columns if name not in found]:
            raise UsageError(
                f"{file} has the columns {', '.join(sorted(found))}, but none named {' and '.join(missing)}; "
                f"prepare the data with telechat_preprocess.py{_without_labels(found)}."
            )
        data = ds.MindDataset(
            [str(file)], columns_list=list(columns), sampler=ds.SubsetSampler(numbers), num_parallel_workers=1
        )
        for number, row in zip(
            numbers, data.create_tuple_iterator(num_epochs=1, output_numpy=True), strict=True
        ):
            yield Row(str(file), number, row[0], row[1] if len(row) > 1 else None)
    except RuntimeError as error:
        raise UsageError(_unreadable(file)) from error


def _without_labels(found: list[str]) -> str:
    if "input_ids" not in found:
        return ""
    return ", or, to train all but the padding, set train_dataset.input_columns: [input_ids]"


def _unreadable(file: Path) -> str:
    return (
        f"{file} is not readable as MindRecord, or empty: damaged, cut short, or something else. Copy "
        f"it again "
        f"with its .db, or prepare the data again."
    )


def check_steps(config: dict, records: int) -> list[str]:
    """Whether the records of ``train_dataset`` fill a step, and what of them an epoch does not train.

    Returns:
        Sentences to print.

    Raises:
        UsageError: they do not fill a single step, or the last batch could not be split.
    """
    devices = device_num() if config.get("use_parallel") else 1
    batch = global_batch_size(config, devices)
    dataset = config.get("train_dataset") or {}
    loader = dataset.get("data_loader") or {}
    records = min(records, loader.get("num_samples") or records)
    steps = steps_per_epoch(config, records, batch, devices)
    if steps == 0:
        raise UsageError(
            f"the data has {counted(records)}, but a step takes {_described(config, batch)}: lower "
            f"--batch_size{' or the factors of the plan' if config.get('use_parallel') else ''}, or "
            f"give more "
            f"data. (drop_remainder is True, so that a step is never smaller.)"
        )
    if steps is None:
        return []
    shards = devices if is_data_parallel(config) else 1
    read = -(-records // shards) * shards  # MindSpore repeats records until the processes have equally many
    rest = read % batch
    notes = []
    if read > records:
        notes.append(
            f"{counted(read - records)} of {records:,} twice in each epoch, as {shards} processes read "
            f"equally many"
        )
    if rest and dataset.get("drop_remainder", True):
        which = "always the last ones" if loader.get("shuffle") is False else "others each time, by shuffle"
        notes.append(
            f"{counted(rest)} of {read:,} not trained in each epoch ({which}): {read // batch} steps take "
            f"{_described(config, batch)} each"
        )
    elif rest and config.get("use_parallel") and shards == 1:
        raise UsageError(
            f"train_dataset.drop_remainder is False, and {counted(records)} in steps of "
            f"{_described(config, batch)} leave a last one of {rest}, which the plan cannot split: set it to "
            f"True."
        )
    elif rest:
        notes.append(f"the last step of each epoch takes {counted(rest)}, as drop_remainder is False")
    return notes


def counted(records: int) -> str:
    """So many records, in words."""
    return f"{records:,} record{'' if records == 1 else 's'}"


def _described(config: dict, batch: int) -> str:
    each = (config.get("runner_config") or {}).get("batch_size") or 1
    return f"{batch:,}" if batch == each else f"{batch:,} (batch_size {each} x {batch // each} by the plan)"
