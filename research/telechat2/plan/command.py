"""The work behind telechat_plan.py."""

import json
import sys
from pathlib import Path

from research.telechat2.plan.check import check
from research.telechat2.plan.draw import draw
from research.telechat2.plan.dry_run import dry_run
from research.telechat2.plan.estimate import estimate
from research.telechat2.plan.search import search
from research.telechat2.plan.settings import read_settings
from research.telechat2.telechat_files import atomic_write


def plan(
    config_name: str,
    changes: dict[str, object],
    *,
    device_num: int | None = None,
    estimated: bool = False,
    search_gb: float | None = None,
    picture: Path | None = None,
    dry: bool = False,
    rank: int | None = None,
    output_dir: Path | None = None,
    json_file: Path | None = None,
) -> str:
    """Check the plan of a config, and on request estimate, improve or compile it; the text to print.

    Args:
        config_name: the YAML; any spelling of ``resolve_config``.
        changes: dotted key to value; they win over the YAML.
        device_num: NPUs that there are; None: as many as the plan takes.
        estimated: estimate memory, communication and speed too.
        search_gb: list the best plans for NPUs of this memory in GB (10^9 bytes), too.
        picture: a new PNG of the estimate, memory per stage and the pipeline's schedule.
        dry: compile the training step too.
        rank, output_dir: see ``dry_run``.
        json_file: a new file for the result.

    Raises:
        ValueError: the plan is illegal, ``json_file`` exists, or see ``dry_run``.
    """
    for name, file in (("--json", json_file), ("--plot", picture)):
        if file and file.exists():
            raise ValueError(f"{file} exists and is not overwritten; give {name} another name.")
    if not dry and (rank is not None or output_dir):
        raise ValueError("--rank and --output_dir are for --dry_run; give that too, or leave them out.")
    path, settings = read_settings(config_name, changes, Path.cwd())
    checked = check(settings, device_num)
    report = {"config": str(path), "check": checked.as_dict()}
    texts = [f"config        {path}\n{checked.table()}"]
    if estimated or picture:
        estimation = estimate(settings)
        report["estimate"] = estimation.as_dict()
        texts.append(estimation.table())
        if picture:
            draw(estimation, picture)
    if search_gb is not None:
        found = search(settings, device_num or checked.device_num, search_gb)
        report["search"] = found.as_dict()
        texts.append(found.table())
    if dry:
        stages = []
        for stage in dry_run(settings, device_num, rank, output_dir):
            stages.append(stage)
            print(f"compiled stage {stage.stage} of {len(checked.stages)}", file=sys.stderr, flush=True)
        report["dry_run"] = [stage.as_dict() for stage in stages]
        texts += [stage.table() for stage in stages]
    if json_file:
        with atomic_write(json_file) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return "\n\n".join(texts)
