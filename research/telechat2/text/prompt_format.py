"""Which prompt format a model was tuned with: recorded with data and checkpoint, used by prediction.

``chat`` is the chat template (``<_system>…\\n<_user>…<_bot>…<_end>\\n``), ``plain`` the README's
(``<_start><_user>…<_bot>…<_end>``), ``v1`` that of TeleChat v1, which has no ``<_start>``. A model answers
badly in another one, and its weights do not show which one it was trained in.
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
        known = ", ".join(PROMPT_FORMATS)
        raise UsageError(f"prompt format {prompt_format!r} is unknown; expected one of {known}")
    return prompt_format


def find(path: str | Path) -> str | None:
    """Return the format in ``record_of`` a checkpoint, None without one; UsageError if it is not readable."""
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
    if not path.exists():
        write_json(path, {"prompt_format": prompt_format})
    elif (recorded := _read(path)) != prompt_format:
        raise UsageError(
            f"{path} records prompt format {recorded!r}, but the new weights have {prompt_format!r}; "
            "use another output folder, or delete the file if it is wrong"
        )


def of_dataset(path: str | Path) -> str | None:
    """Return the format of a MindRecord file, or of all those under a directory; None without a manifest.

    UsageError when two files disagree or a manifest is not readable.
    """
    path = Path(path)
    is_folder = path.is_dir()
    manifests = path.rglob(f"*.mindrecord*{MANIFEST_SUFFIX}") if is_folder else [manifest_path(path)]
    found = {_read(manifest): manifest for manifest in sorted(manifests, reverse=True) if manifest.is_file()}
    if len(found) > 1:
        formats = " and ".join(f"{manifest} has {name!r}" for name, manifest in sorted(found.items()))
        raise UsageError(f"the data in {path} differ in prompt format: {formats}; train on one at a time")
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
