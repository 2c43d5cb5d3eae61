"""Whether a data set can be read, and whether it is this model's: checked before the model is built.

MindSpore finds a missing index or a record that is too long minutes later, and a foreign vocabulary never.
"""

import os
import re
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import read_json
from research.telechat2.config.check import check
from research.telechat2.config.model_settings import ModelSettings
from research.telechat2.data.records import Rules, check_records, too_long, too_many_tokens
from research.telechat2.data.same_vocabulary import check_data_vocabulary
from research.telechat2.run.processes import device_num, is_data_parallel
from research.telechat2.run.records import COLUMNS, count_records, read_rows
from research.telechat2.run.steps import check_steps, counted
from research.telechat2.text.prompt_format import manifest_path


def check_dataset(config: dict, which: str, weights: str | None = None) -> dict[Path, int | None]:
    """Refuse a data set that is missing, incomplete, or not this model's; print what is checked.

    Each MindRecord file is compared by its manifest and by its records, evenly spaced ones where there are
    many. Records may be shorter than the model's ``seq_length``, not longer.

    Args:
        which: "train" or "eval".
        weights: what is loaded, whose vocabulary is compared; None: random weights.

    Returns:
        Each file and its records, in MindFormers' order; empty for a loader of another type.
    """
    section = config.get(f"{which}_dataset") or {}
    loader = section.get("data_loader") or {}
    if loader.get("type", "MindDataset") != "MindDataset":
        print(f"{which} data: not checked, its data_loader is a {loader['type']}", flush=True)
        return {}
    files = {file: count_records(file) for file in files_of_loader(loader, which)}
    first, records = next(iter(files)), sum(count or 0 for count in files.values())
    columns = _input_columns(section, which)
    model = (config.get("model") or {}).get("model_config") or {}
    rules = _rules(model, section)
    unchecked = [key for key in ("seq_length", "vocab_size") if model.get(key) is None]
    if unchecked:
        print(f"{which} data: not compared with the model, whose YAML states no {', '.join(unchecked)}")
    manifests = {file: _checked_manifest(file, count, rules) for file, count in files.items()}
    seen = check_records(read_rows(files, columns), rules)
    told = max((manifest.get("documents_per_record", 0) for manifest in manifests.values()), default=0)
    if rules.start_ids:
        documents = max(told, seen.documents)
        if documents > (limit := model.get("max_documents", ModelSettings.max_documents)):
            raise UsageError(
                f"{first.parent} holds records of {documents} documents, but the model keeps {limit} apart; "
                f"give --model.model_config.max_documents {documents}, or leave document_start_ids out."
            )
    elif told > 1:
        what = f"up to {told} conversations of a record see each other, as document_start_ids is []"
        print(f"{which} data: {what}", flush=True)
    _check_shorter(config, seen.length, which)
    without = sum(not manifest for manifest in manifests.values())
    how = f", {without} of them without manifest" if without else ""
    read = "all" if seen.records == records else f"{seen.records:,} of them, evenly spaced,"
    print(
        f"{which} data: {loader.get('dataset_dir') or first} ({len(files)} files{how}), "
        f"{counted(records)} of {seen.length:,} ids, {read} checked",
        flush=True,
    )
    if seen.untrained:
        which_ones = f"{seen.untrained:,} of {seen.records:,} records, {seen.first_untrained} the first"
        print(f"{which} data: no token is trained in {which_ones}", flush=True)
    for note in check_steps(config, records) if which == "train" else []:
        print(f"{which} data: {note}", flush=True)
    check_data_vocabulary(files, weights)
    return files


def _input_columns(section: dict, which: str) -> tuple[str, ...]:
    """The columns that the model is given, in its order; UsageError for others than it takes."""
    columns = tuple(section.get("input_columns") or COLUMNS)
    if columns not in (COLUMNS, COLUMNS[:1]):
        raise UsageError(
            f"{which}_dataset.input_columns is {list(columns)}; expected {list(COLUMNS)} in this order, or "
            "input_ids alone, of which all but padding is trained."
        )
    if section.get("eod_reset"):
        raise UsageError(
            f"{which}_dataset.eod_reset is {section['eod_reset']}, which adds inputs that the model does not "
            "take; leave it out. model.model_config.document_start_ids keeps packed documents apart."
        )
    return columns


def _rules(model: dict, section: dict) -> Rules:
    return Rules(
        seq_length=model.get("seq_length"),
        vocab_size=model.get("vocab_size"),
        ignored=model.get("ignore_token_id", -100),
        pad=model.get("pad_token_id", 3),
        one_length=not section.get("dynamic_batch"),
        start_ids=tuple(sorted(model.get("document_start_ids") or [])),
    )


def _checked_manifest(file: Path, found: int | None, rules: Rules) -> dict:
    """A file's manifest, compared with the model and with the index; empty where there is none."""
    if not Path(f"{file}.db").is_file():
        raise UsageError(
            f"{file} has no index {file.name}.db beside it; copy both files, or prepare the data again with "
            "telechat_preprocess.py."
        )
    manifest = read_json(manifest_path(file)) or {}
    length, vocab_size = manifest.get("max_length"), (manifest.get("tokenizer") or {}).get("vocab_size")
    if None not in (length, rules.seq_length) and length > rules.seq_length:
        raise UsageError(too_long(file, length, rules.seq_length))
    if None not in (vocab_size, rules.vocab_size) and vocab_size > rules.vocab_size:
        raise UsageError(too_many_tokens(file, vocab_size, rules.vocab_size))
    starts = manifest.get("document_start_ids")
    if rules.start_ids and starts is not None and sorted(starts) != list(rules.start_ids):
        raise UsageError(
            f"documents in {file} begin with the ids {sorted(starts)}, but the model's document_start_ids is "
            f"{list(rules.start_ids)}; give --model.model_config.document_start_ids {sorted(starts)}, or [] "
            "if all of a record may see each other."
        )
    parts = {part.get("name"): part.get("records") for part in manifest.get("files") or []}
    told = parts.get(file.name, manifest.get("records"))
    if None not in (told, found) and told != found:
        raise UsageError(
            f"{file} holds {found:,} records, but its manifest {manifest_path(file).name} says {told:,}; "
            "copy all files of the data again, or delete the manifest."
        )
    return manifest


def _check_shorter(config: dict, length: int, which: str) -> None:
    """Print that records are shorter than seq_length; refuse it where the plan cannot split them."""
    seq_length = ((config.get("model") or {}).get("model_config") or {}).get("seq_length")
    if seq_length is None or length - 1 == seq_length:
        return
    shorter = f"{length - 1:,} tokens, fewer than seq_length {seq_length:,} (of {seq_length + 1:,} ids)"
    print(f"{which} data: records of {length:,} ids give sequences of {shorter}", flush=True)
    if not config.get("use_parallel"):
        return
    model = config["model"] | {"model_config": config["model"]["model_config"] | {"seq_length": length - 1}}
    try:
        check(config | {"model": model}, device_num() if is_data_parallel(config) else None)
    except UsageError as error:
        raise UsageError(
            f"this plan cannot split records of {length:,} ids, sequences of {length - 1:,} tokens: {error} "
            f"(Or prepare the data with --max_length {seq_length}.)"
        ) from error


def files_of_loader(loader: dict, which: str) -> list[Path]:
    """The MindRecord files that MindFormers reads for a data_loader; makes ``dataset_dir`` absolute."""
    if not (given := loader.get("dataset_dir") or loader.get("dataset_files")):
        raise UsageError(
            f"no data: give --{which}_dataset_dir a .mindrecord file of telechat_preprocess.py, or a "
            "directory of them."
        )
    if isinstance(given, (list, tuple)):
        files = [Path(name).expanduser() for name in given]
    else:
        path = Path(given).expanduser().absolute()
        if "dataset_dir" in loader:
            loader["dataset_dir"] = str(path)
        # the pattern by which MindFormers finds files below a directory
        inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        files = sorted(f for f in inside if re.search(r"mindrecord\d*$", f.name))
        if path.is_dir() and not files:
            raise UsageError(f"{path} holds no .mindrecord file; give --{which}_dataset_dir one that does.")
        files = files or [path]
    for file in files:
        if file.parent.name.endswith(".partial"):
            raise UsageError(
                f"{file.parent} is of a preparation that has not ended, and would be read too; end it "
                "(telechat_preprocess.py, --resume), or delete the folder."
            )
        if not file.is_file():
            raise UsageError(f"there is no data set {file}; give --{which}_dataset_dir a path that exists.")
    return files


def fit_dataset_workers(config: dict) -> None:
    """Lower the data set's threads to the number of cores, above which MindSpore refuses them."""
    cores = os.cpu_count() or 1
    for which in ("train", "eval"):
        for section in (f"{which}_dataset", f"{which}_dataset_task"):
            dataset = config.get(section) or {}
            dataset = dataset.get("dataset_config", dataset)
            if (workers := dataset.get("num_parallel_workers", 1)) > cores:
                print(
                    f"{section}: num_parallel_workers {workers}, but {cores} cores; using {cores}", flush=True
                )
                dataset["num_parallel_workers"] = cores
