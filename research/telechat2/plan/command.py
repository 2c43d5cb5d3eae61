"""The work behind telechat_plan.py."""

import json
from math import inf
from pathlib import Path

from research.telechat2.common.errors import UsageError
from research.telechat2.common.files import atomic_write
from research.telechat2.config.overrides import apply_overrides
from research.telechat2.config.preflight import Facts, preflight
from research.telechat2.config.yaml_files import read_config, resolve_config
from research.telechat2.plan.dry_run.report import dry_run
from research.telechat2.plan.estimate.draw import draw
from research.telechat2.plan.estimate.estimate import estimate
from research.telechat2.plan.estimate.search import search
from research.telechat2.plan.prediction import check_prediction, is_prediction


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
        search_gb: list the best plans for NPUs of this memory in GB (10^9 bytes), too.
        picture, json_file: new files for a PNG of the estimate and for the result.
        rank, output_dir: see ``dry_run``.

    Raises:
        UsageError: the plan is illegal, ``json_file`` exists, or see ``dry_run``.
    """
    _check_options(
        {"--device_num": device_num, "--search": search_gb}, {"--json": json_file, "--plot": picture}
    )
    if not dry and (rank is not None or output_dir):
        raise UsageError("--rank and --output_dir need --dry_run; give it too, or leave them out.")
    path = resolve_config(config_name, Path.cwd())
    settings = read_config(path)
    apply_overrides(settings, changes)
    devices = None if search_gb is not None else device_num  # others are searched for
    preflighted = preflight(settings, Facts(str(path), "plan", devices=devices))
    notes = preflighted.notes
    if is_prediction(settings):
        asked = {"--search": search_gb is not None, "--plot": picture is not None, "--dry_run": dry}
        _refuse_of_prediction(path, [name for name, given in asked.items() if given])
    checked = preflighted.plan or check_prediction(settings, device_num)
    report: dict[str, object] = {"config": str(path), "check": checked.as_dict()}
    report |= {"left_out": notes} if notes else {}
    texts = [f"config        {path}\n{checked.table()}" + "".join(f"\n\nnote: {note}" for note in notes)]
    if (estimated or picture) and not is_prediction(settings):
        estimation = estimate(settings)
        report["estimate"] = estimation.as_dict()
        texts.append(estimation.table())
        if picture:
            draw(estimation, picture)
    found = None
    if search_gb is not None:
        found = search(settings, device_num or checked.device_num, search_gb)
        report["search"] = found.as_dict()
        texts.append(found.table())
    if dry:
        stages = list(dry_run(settings, device_num, rank, output_dir))
        report["dry_run"] = [stage.as_dict() for stage in stages]
        texts += [stage.table() for stage in stages]
    if json_file:
        with atomic_write(json_file) as temporary:
            temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if found and not found.plans:
        print("\n\n".join(texts[:-1]))
        raise UsageError(f"no plan of {device_num or checked.device_num} NPUs is found: {found.table()}")
    return "\n\n".join(texts)


def _check_options(numbers: dict[str, float | None], files: dict[str, Path | None]) -> None:
    for name, number in numbers.items():
        if number is not None and not 0 < number < inf:
            raise UsageError(f"{name} is {number}; it must be above 0.")
    for name, file in files.items():
        if file and file.exists():
            raise UsageError(f"{file} exists and is not overwritten; give {name} another name.")
        if file and not file.absolute().parent.is_dir():
            raise UsageError(f"{name} {file}: there is no folder {file.absolute().parent}; make it first.")
        if file and name == "--plot" and file.suffix != ".png":
            raise UsageError(f"{name} is {file}, but pictures are PNG files; call it {file.stem}.png.")


def _refuse_of_prediction(path: Path, flags: list[str]) -> None:
    if flags:
        raise UsageError(
            f"{path} is of a prediction, which takes no {' and no '.join(flags)}. Use the model's finetune "
            "YAML, or leave that out; --estimate shows the memory."
        )
