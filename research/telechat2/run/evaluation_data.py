"""Evaluation data: every record once, in equal batches, however many processes share them.

MindSpore's sampler repeats records where they cannot be shared out evenly, and the last batch would be a
smaller one, for which the model is compiled again, and which a cluster cannot split. Here batches are filled
up with records of which no token is trained: they add nothing to the sums.
"""

import math
from pathlib import Path

import mindspore.dataset as ds
import numpy as np
from mindspore import int32

from research.telechat2.run.dataset import files_of_loader
from research.telechat2.run.records import COLUMNS


def evaluation_data(config, shard: tuple[int, int]):
    """The evaluation_dataset of MindFormers' config, described in a line; None if it reads other data.

    Args:
        config: with the sections ``eval_dataset``, whose ``batch_size`` is that of a process, and ``model``.
        shard: this process's number, and how many there are.
    """
    section, model = config.eval_dataset, config.model.model_config
    columns = tuple(section.input_columns)
    if section.data_loader.type != "MindDataset" or columns not in (COLUMNS, COLUMNS[:1]):
        return None
    data, total, batches = evaluation_dataset(
        files_of_loader(section.data_loader, "eval"),
        section.batch_size,
        shard,
        num_samples=section.data_loader.get("num_samples"),
        ignored=model.get("ignore_token_id", -100),
        pad=None if columns == COLUMNS else model.get("pad_token_id", 3),
    )
    empty = batches * section.batch_size * shard[1] - total
    shared = f" on each of {shard[1]} processes" if shard[1] > 1 else ""
    filled = f", {empty} places empty" if empty else ""
    print(
        f"eval data: {total:,} records, each counted once, in {batches:,} batches of {section.batch_size}"
        f"{shared}{filled}",
        flush=True,
    )
    return data


def evaluation_dataset(
    files: list[Path],
    batch_size: int,
    shard: tuple[int, int] = (0, 1),
    num_samples: int | None = None,
    ignored: int = -100,
    pad: int | None = None,
):
    """The batches of one process, how many records all processes have together, and how many batches each.

    A batch is ``input_ids`` and ``labels``, int32 ``[batch_size, length]`` each.

    Args:
        files: MindRecord files; they are read one after the other.
        batch_size: records of a batch, of this process.
        shard: this process's number, and how many there are.
        num_samples: only as many of the first records; None: all.
        ignored: the label of a token that is not trained.
        pad: None: the files have labels. A number: they have none, and all ids but this one are trained.
    """
    names = [str(file) for file in files]
    columns = list(COLUMNS if pad is None else COLUMNS[:1])
    total = ds.MindDataset(names, columns_list=columns, shuffle=False).get_dataset_size()
    total = min(total, num_samples or total)
    number, shards = shard
    start, end = (total * place // shards for place in (number, number + 1))
    batches = math.ceil(math.ceil(total / shards) / batch_size)
    filling = batches * batch_size - (end - start)

    first = _with_labels(_read(names, columns, 0, 1), pad, ignored)
    ids = next(first.create_tuple_iterator(num_epochs=1, output_numpy=True))[0]
    parts = [_with_labels(_read(names, columns, start, end - start), pad, ignored)] if end > start else []
    if filling:
        empty = {"input_ids": [ids] * filling, "labels": [np.full_like(ids, ignored)] * filling}
        parts.append(ds.NumpySlicesDataset(empty, shuffle=False))
    data = parts[0] if len(parts) == 1 else parts[0].concat(parts[1])
    return data.batch(batch_size, drop_remainder=True), total, batches


def _read(names, columns, start, count):
    sampler = ds.SequentialSampler(start, count)
    data = ds.MindDataset(names, columns_list=columns, sampler=sampler)
    for column in columns:
        data = data.map(ds.transforms.TypeCast(int32), column)
    return data


def _with_labels(data, pad: int | None, ignored: int):
    """With the labels that the model takes for data without."""
    if pad is None:
        return data

    def labelled(ids):
        return ids, np.where(ids == pad, ignored, ids).astype(np.int32)

    return data.map(labelled, list(COLUMNS[:1]), list(COLUMNS))
