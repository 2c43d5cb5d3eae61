"""Whether a data set can be read, and whether it is this model's: asked before the model is built.

MindSpore finds a missing index or a record that is too long minutes later, and a foreign vocabulary never: it
reads ids beyond the embedding without a word.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from research.telechat2.data.writing import count_documents
from research.telechat2.telechat_kernel_rules import MAX_DOCUMENTS
from research.telechat2.telechat_prompt_format import manifest_path

COLUMNS = ("input_ids", "labels")


def check_dataset(config: dict, which: str) -> None:
    """Refuse a data set that is missing, incomplete, or prepared for another model; print what is checked.

    Each MindRecord file is compared by its manifest, which telechat_preprocess.py wrote; by its first record
    where it has none. Records may be shorter than the model's ``seq_length``, not longer.

    Args:
        config: the settings.
        which: "train" or "eval".

    Raises:
        ValueError: with the file, what it holds, and what the model takes.
    """
    section = config.get(f"{which}_dataset") or {}
    loader = section.get("data_loader") or {}
    if loader.get("type", "MindDataset") != "MindDataset":
        print(f"{which} data: not checked, its data_loader is a {loader['type']}", flush=True)
        return
    files = files_of_loader(loader, which)
    model = (config.get("model") or {}).get("model_config") or {}
    limits = {key: model.get(key) for key in ("seq_length", "vocab_size")}
    start_ids = sorted(model.get("document_start_ids") or [])
    unchecked = [key for key, limit in limits.items() if limit is None]
    if unchecked:
        print(f"{which} data: not compared with the model, whose YAML states no {', '.join(unchecked)}")
    without_manifest = 0
    for file in files:
        if not Path(f"{file}.db").is_file():
            raise ValueError(
                f"{file} has no index {file.name}.db beside it, and cannot be read without: copy both files, "
                f"or prepare the data again with telechat_preprocess.py."
            )
        manifest = _manifest(file)
        found = _prepared_for(manifest)
        if None in found.values():
            without_manifest += 1
            first = _from_first_record(file)
            found |= {key: first[key] for key, value in found.items() if value is None}
        _compare(file, found, limits)
        if start_ids:
            documents = _documents_per_record(file, manifest, start_ids)
            _compare_documents(file, documents, model.get("max_documents", MAX_DOCUMENTS))
    how = f", {without_manifest} of them without manifest: first records checked" if without_manifest else ""
    print(f"{which} data: {loader.get('dataset_dir') or files[0]} ({len(files)} files{how})", flush=True)


def record_files(config: dict, which: str) -> list[Path]:
    """The MindRecord files of the ``train`` or ``eval`` data in MindFormers' order; none of other loaders."""
    loader = (config.get(f"{which}_dataset") or {}).get("data_loader") or {}
    return files_of_loader(loader, which) if loader.get("type", "MindDataset") == "MindDataset" else []


def files_of_loader(loader: dict, which: str) -> list[Path]:
    """The MindRecord files that MindFormers reads for a data_loader; makes ``dataset_dir`` absolute."""
    if not (given := loader.get("dataset_dir") or loader.get("dataset_files")):
        raise ValueError(
            f"no data: give --{which}_dataset_dir a .mindrecord file or a directory of them, as written by "
            f"research/telechat2/telechat_preprocess.py."
        )
    if isinstance(given, (list, tuple)):
        files = [Path(name).expanduser() for name in given]
    else:
        path = Path(given).expanduser().absolute()
        if "dataset_dir" in loader:
            loader["dataset_dir"] = str(path)
        # the pattern by which MindFormers finds files below a directory
        inside = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        files = (
            [path] if path.is_file() else sorted(f for f in inside if re.search(r"mindrecord\d*$", f.name))
        )
        if path.is_dir() and not files:
            raise ValueError(f"{path} holds no .mindrecord file; give --{which}_dataset_dir one that does.")
        files = files or [path]
    for file in files:
        if file.parent.name.endswith(".partial"):
            raise ValueError(
                f"{file.parent} is of a preparation that is under way or was stopped, and would be read too: "
                f"end it (telechat_preprocess.py, --resume), or delete the folder."
            )
        if not file.is_file():
            raise ValueError(f"there is no data set {file}; give --{which}_dataset_dir a path that exists.")
    return files


def _manifest(file: Path) -> dict:
    """The manifest of a MindRecord file, empty where there is none."""
    path = manifest_path(file)
    manifest = {}
    if path.is_file():
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); correct or delete it.") from error
    if not isinstance(manifest, dict):
        raise ValueError(f"{path} holds a JSON {type(manifest).__name__}, expected an object; delete it.")
    return manifest


def _prepared_for(manifest: dict) -> dict:
    """``seq_length`` and ``vocab_size`` that the data was prepared for; None where the manifest is silent."""
    vocab_size = (manifest.get("tokenizer") or {}).get("vocab_size")
    return {"seq_length": manifest.get("max_length"), "vocab_size": vocab_size}


def _documents_per_record(file: Path, manifest: dict, start_ids: list[int]) -> int:
    """Documents of a record at most: as the manifest says, if it means the same ones, else counted."""
    if "documents_per_record" in manifest and sorted(manifest.get("document_start_ids") or []) == start_ids:
        return manifest["documents_per_record"]
    print(f"{file}: reading all records, to count the documents of each", flush=True)
    return max(count_documents(record["input_ids"], start_ids) for record in _records(file))


def _records(file: Path) -> Iterator[dict]:
    """All records of a MindRecord file."""
    from mindspore.mindrecord import FileReader

    reader = FileReader(str(file))
    yield from reader.get_next()
    reader.close()


def _from_first_record(file: Path) -> dict:
    """The least ``seq_length`` and ``vocab_size`` that a file's first record needs."""
    try:
        with closing(_records(file)) as records:
            record = next(records)
    except (RuntimeError, StopIteration) as error:
        raise ValueError(
            f"{file} is not readable as MindRecord, or empty: damaged, cut short, or something else. Copy it "
            f"again with its .db, or prepare the data again."
        ) from error
    missing = [name for name in COLUMNS if name not in record]
    if missing:
        raise ValueError(
            f"{file} has the columns {', '.join(sorted(record))}, expected {' and '.join(COLUMNS)}; prepare "
            f"the data with telechat_preprocess.py."
        )
    ids = record["input_ids"]
    return {"seq_length": len(ids) - 1, "vocab_size": int(ids.max()) + 1}


def _compare(file: Path, found: dict, limits: dict) -> None:
    length, seq_length = found["seq_length"], limits["seq_length"]
    if seq_length is not None and length > seq_length:
        raise ValueError(
            f"{file} holds records of {length + 1} ids, for sequences of {length} tokens, but the model's "
            f"seq_length is {seq_length}: prepare the data with --max_length {seq_length}, or set "
            f"--model.model_config.seq_length {length}."
        )
    if limits["vocab_size"] is not None and found["vocab_size"] > limits["vocab_size"]:
        raise ValueError(
            f"{file} needs a vocabulary of {found['vocab_size']} tokens, but the model's vocab_size is "
            f"{limits['vocab_size']}: prepare the data with this model's tokenizer.model, or use the YAML of "
            f"the model whose tokenizer it was."
        )


def _compare_documents(file: Path, documents: int, limit: int) -> None:
    if documents > limit:
        raise ValueError(
            f"{file} holds records of {documents} documents, but the model keeps {limit} apart: set "
            f"--model.model_config.max_documents {documents}, or leave document_start_ids out."
        )


def fit_dataset_workers(config: dict) -> None:
    """MindSpore refuses more data set threads than there are cores; take as many as there are, saying so."""
    cores = os.cpu_count() or 1
    for which in ("train", "eval"):
        for section in (f"{which}_dataset", f"{which}_dataset_task"):
            dataset = config.get(section) or {}
            dataset = dataset.get("dataset_config", dataset)
            if dataset.get("num_parallel_workers", 1) > cores:
                print(
                    f"{section}: num_parallel_workers {dataset['num_parallel_workers']} is more than the "
                    f"{cores} cores of this machine; using {cores}",
                    flush=True,
                )
                dataset["num_parallel_workers"] = cores
