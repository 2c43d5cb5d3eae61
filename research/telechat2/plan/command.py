"""The work behind telechat_plan.py."""

import json
from pathlib import Path

from research.telechat2.plan.check import check
from research.telechat2.plan.settings import read_settings
from research.telechat2.telechat_files import atomic_write


def plan(
    config_name: str,
    changes: dict[str, object],
    *,
    device_num: int | None = None,
    json_file: Path | None = None,
) -> str:
    """Check the plan of a config; the text to print.

    Args:
        config_name: the YAML; any spelling of ``resolve_config``.
        changes: dotted key to value; they win over the YAML.
        device_num: NPUs that there are; None: as many as the plan takes.
        json_file: a new file for the result.

    Raises:
        ValueError: the plan is illegal, or ``json_file`` exists.
    """
    if json_file and json_file.exists():
        raise ValueError(f"{json_file} exists and is not overwritten; give --json another name.")
    path, settings = read_settings(config_name, changes, Path.cwd())
    checked = check(settings, device_num)
    report = {"config": str(path), "check": checked.as_dict()}
    if json_file:
        with atomic_write(json_file) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return f"config        {path}\n{checked.table()}"
