"""Which prompt format a model was tuned with: recorded with data and checkpoint, used by prediction.

``chat`` is the chat template (``<_system>…\\n<_user>…<_bot>…<_end>\\n``), ``plain`` the README's
(``<_start><_user>…<_bot>…<_end>``), ``v1`` that of TeleChat v1, which has no ``<_start>``. A model answers
badly in another one, and its weights do not show which one it was trained in. A small file beside them does.
"""

import json
import re
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import write_json

PROMPT_FORMATS = ("chat", "plain", "v1")
FILE_NAME = "prompt_format.json"
MANIFEST_SUFFIX = ".json"  # dataset.mindrecord -> dataset.mindrecord.json
_FOLDER_OF_A_RUN = re.compile(r"checkpoint|iteration_\d+|rank_\d+")


def check(prompt_format: str) -> str:
    """Return ``prompt_format``; UsageError when it is none of PROMPT_FORMATS."""
    if prompt_format not in PROMPT_FORMATS:
        raise UsageError(
            f"prompt format {prompt_format!r} is unknown; expected one of {', '.join(PROMPT_FORMATS)}"
        )
    return prompt_format


def find(path: str | Path) -> str | None:
    """Return the format recorded for a checkpoint file or directory, None when none is.

    Looks where ``record_of`` does. UsageError when a record is not readable.
    """
    record = record_of(path)
    return None if record is None else _read(record)


def record_of(path: str | Path) -> Path | None:
    """Return the file that records the format of a checkpoint file or directory, None when there is none.

    Looks into the directory, and from the folders that MindFormers makes within a run's output
    (``checkpoint``, ``iteration_*``, ``rank_*``) into their parents; other parents may hold other models.
    """
    folder = Path(path).absolute()
    if not folder.is_dir():
        folder = folder.parent
    while not (folder / FILE_NAME).is_file():
        if not _FOLDER_OF_A_RUN.fullmatch(folder.name):
            return None
        folder = folder.parent
    return folder / FILE_NAME


def write(directory: str | Path, prompt_format: str) -> None:
    """Record ``prompt_format`` in ``directory``, atomically; UsageError when another one is there."""
    path = Path(directory) / FILE_NAME
    check(prompt_format)
    if path.exists():
        recorded = _read(path)
        if recorded != prompt_format:
            raise UsageError(
                f"{path} records prompt format {recorded!r}, but {prompt_format!r} was to be recorded "
                f"there: one folder holds checkpoints of one format; use another output folder, or delete "
                f"the file if it is wrong"
            )
        return
    write_json(path, {"prompt_format": prompt_format})


def of_dataset(path: str | Path) -> str | None:
    """Return the format of a MindRecord file, or of all those under a directory; None without a manifest.

    Raises UsageError when two files disagree or a manifest is not readable.
    """
    path = Path(path)
    manifests = (
        sorted(path.rglob(f"*.mindrecord*{MANIFEST_SUFFIX}")) if path.is_dir() else [manifest_path(path)]
    )
    found: dict[str, Path] = {}
    for manifest in manifests:
        if manifest.is_file():
            found.setdefault(_read(manifest), manifest)
    if len(found) > 1:
        formats = " and ".join(f"{manifest} has {name!r}" for name, manifest in sorted(found.items()))
        raise UsageError(
            f"the data sets in {path} differ in prompt format: {formats}; train on one format at a time"
        )
    return next(iter(found), None)


def manifest_path(mindrecord: str | Path) -> Path:
    """Return the path of a MindRecord file's manifest."""
    return Path(f"{mindrecord}{MANIFEST_SUFFIX}")


def _read(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        return check(content["prompt_format"])
    except (json.JSONDecodeError, UnicodeDecodeError, UsageError, KeyError, TypeError) as error:
        raise UsageError(
            f'{path} does not hold {{"prompt_format": "chat"}} or "plain" ({error}); correct or delete it'
        ) from error
