"""How many records a step takes, and an epoch has steps, as MindFormers counts them."""

from research.telechat2.common.errors import UsageError
from research.telechat2.run.processes import device_num, is_data_parallel


def global_batch_size(config: dict, devices: int) -> int:
    """Records of a step, of all devices together, as MindFormers counts them."""
    runner, plan = (config.get(name) or {} for name in ("runner_config", "parallel_config"))
    batch = runner.get("batch_size") or 1
    if not config.get("use_parallel"):
        return batch
    if is_data_parallel(config):
        return batch * devices
    stages = plan.get("pipeline_stage") or 1
    times = plan.get("micro_batch_num") if stages > 1 else runner.get("gradient_accumulation_steps")
    return batch * (plan.get("data_parallel") or 1) * (times or 1)


def steps_per_epoch(config: dict, records: int, batch: int, devices: int) -> int | None:
    """Steps of a pass over the data; None where MindSpore alone knows."""
    dataset = config.get("train_dataset") or {}
    parallel = config.get("parallel") or {}
    shards = 1
    if config.get("use_parallel"):
        if is_data_parallel(config):
            shards = devices
        elif not parallel.get("full_batch", True):
            return None
    if dataset.get("dynamic_batch"):
        return None
    loader = dataset.get("data_loader") or {}
    if (samples := loader.get("num_samples")) is not None:
        records = min(samples, records)
    each, rest = -(-records // shards), batch // shards
    whole = dataset.get("drop_remainder", True)
    return (each // rest if whole else -(-each // rest)) * (dataset.get("repeat") or 1)


def check_steps(config: dict, records: int) -> list[str]:
    """What an epoch does not train of the records of ``train_dataset``, as sentences to print.

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
            f"the data has {counted(records)}, but a step takes {_described(config, batch)}; lower "
            f"--batch_size{' or the factors of the plan' if config.get('use_parallel') else ''}, "
            "or give more data."
        )
    if steps is None:
        return []
    shards = devices if is_data_parallel(config) else 1
    read = -(-records // shards) * shards  # MindSpore repeats records until the processes have equally many
    rest = read % batch
    notes = []
    if read > records:
        twice = f"{counted(read - records)} of {records:,} twice in each epoch"
        notes.append(f"{twice}, as {shards} processes read equally many")
    if rest and dataset.get("drop_remainder", True):
        which = "always the last ones" if loader.get("shuffle") is False else "others each time, by shuffle"
        notes.append(
            f"{counted(rest)} of {read:,} not trained in each epoch ({which}): {read // batch} steps take "
            f"{_described(config, batch)} each"
        )
    elif rest and config.get("use_parallel") and shards == 1:
        raise UsageError(
            f"the last step of {counted(records)} in steps of {_described(config, batch)} has {rest}, which "
            "the plan cannot split; set train_dataset.drop_remainder to True."
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
