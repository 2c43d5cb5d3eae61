"""The one check of a YAML with its overrides, called by every command before anything else is done."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from research.telechat2.common.errors import UsageError
from research.telechat2.common.problems import check_all, noted_in, refuse
from research.telechat2.config.check import CheckedPlan, check
from research.telechat2.config.classes import TELECHAT_CONFIGS
from research.telechat2.config.evaluation import check_evaluation_settings
from research.telechat2.config.foreign_code import settle_classes
from research.telechat2.config.key_check import read_keys
from research.telechat2.config.migration import leave_out, missing_files
from research.telechat2.config.mindspore_context import check_parallel_sections
from research.telechat2.config.optimization import check_optimization, check_seed
from research.telechat2.config.overrides import apply_overrides
from research.telechat2.config.release import Said, settle_model
from research.telechat2.config.sections import Settings, section_of
from research.telechat2.config.sharing import prediction_plan
from research.telechat2.config.yaml_files import read_config, resolve_config

TRAINING = ("train", "finetune")
RUN_MODES = (*TRAINING, "eval", "predict", "predict_with_train_model")


@dataclass(frozen=True)
class Facts:
    """What a command knows besides the YAML, as plain values: the check reads no other file.

    Attributes:
        source: what messages call the YAML with its changes.
        task: ``run``: what the YAML's run_mode says, started now, so that all files it reads are here;
            ``predict``: a prediction, whatever the YAML says; ``plan``: what a run would be; None: only the
            settings themselves.
        register: see settle_classes.
        devices: processes or NPUs that take part; None: as many as the plan takes.
        changed: settings that the command line gives, dotted key to value.
        weights: whether there are weights.
        said: what the config.json beside the weights states; None: there is none.
    """

    source: str = "the YAML"
    task: Literal["run", "predict", "plan"] | None = None
    register: Path | None = None
    devices: int | None = None
    changed: Mapping[str, object] = field(default_factory=dict)
    weights: bool = False
    said: Said | None = None


@dataclass(frozen=True)
class Checked:
    """What the check found.

    Attributes:
        notes: on settings without effect, which were left out.
        taken: on numbers of config.json that were written into ``model_config``; lines for the screen.
        plan: of a training.
        shared: the ``parallel_config`` of processes that predict; None: one process predicts alone.
    """

    notes: list[str]
    taken: list[str]
    plan: CheckedPlan | None
    shared: Settings | None


def preflight(settings: Settings, facts: Facts) -> Checked:
    """Check all settings at once, and bring them into the form that a run reads.

    Args:
        settings: the YAML with overrides, not yet completed by MindFormers' defaults. Changed in place: what
            has no effect is taken out, text that is a number becomes one, config.json completes the rest.
        facts: what the command knows besides.

    Raises:
        UsageError: lists all settings that are to be changed.
    """
    # 1. Settings of other releases that have no effect here are left out.
    notes, problems = leave_out(settings)
    # 2. Named classes are those of this project, or lie below --register_path.
    problems += settle_classes(settings, facts.register)
    # 3. Something reads each key, and each value is of its kind.
    unread, misread = read_keys(settings)
    problems += unread
    # 4. The files that the YAML names are there.
    (problems if facts.task == "run" else notes).extend(missing_files(settings))
    # 5. A run has the sections that its task needs.
    if facts.task == "run":
        with noted_in(misread):
            _check_task(settings)
    if misread:
        refuse(problems + misread, facts.source)  # the next steps compute with the values
    # 6. Random numbers begin at the seed.
    with noted_in(problems):
        check_seed(settings.get("seed"))
    # 7. The YAML and the config.json beside the weights describe one model.
    taken: list[str] = []
    with noted_in(problems):
        if facts.weights:
            lines = settle_model(settings, facts.said, facts.source)
            taken = [f"model_config: {line}" for line in lines]
    # 8. The model, its plan and the target's kernels and memory fit together.
    plan, shared = None, None
    with noted_in(problems):
        plan, shared = _check_plan(settings, facts, notes)
    refuse(problems, facts.source)
    return Checked(notes, taken, plan, shared)


def read_settings(name: str, changes: Mapping[str, object], cwd: Path) -> tuple[Path, Settings]:
    """The file that ``--config name`` means, and its settings with ``changes``, checked by themselves.

    Raises:
        UsageError: no such file, or see preflight.
    """
    path = resolve_config(name, cwd)
    settings = read_config(path)
    apply_overrides(settings, changes)
    preflight(settings, Facts(str(path)))
    return path, settings


def _check_task(settings: Settings) -> None:
    """Refuse a run without a mode, or without the sections that it reads."""
    mode = settings.get("run_mode")
    if mode not in RUN_MODES:
        raise UsageError(
            f"run_mode is {mode!r}, expected one of {', '.join(RUN_MODES)}; set it or --run_mode."
        )
    if section_of(settings, "context").get("mode", 0) != 0:
        raise UsageError("context.mode must be 0: the TeleChat2 models run in static graph mode only.")
    needed = ["model", "trainer"]
    needed += ["train_dataset", "optimizer", "runner_wrapper"] if mode in TRAINING else []
    if missing := [section for section in needed if not settings.get(section)]:
        raise UsageError(
            f"the section {', '.join(missing)} is missing, which run_mode {mode} needs; use the "
            f"{'finetune' if mode in TRAINING else 'predict'} YAML of this model."
        )
    if mode.startswith("predict") and not settings.get("input_data"):
        raise UsageError(
            "nothing to predict: give --predict_data PROMPT…, or a text file with a prompt on each line."
        )


def _check_plan(
    settings: Settings, facts: Facts, notes: list[str]
) -> tuple[CheckedPlan | None, Settings | None]:
    """The plan of a training, or of processes that predict; of an evaluation the numbers of its run."""
    mode = facts.task if facts.task == "predict" else str(settings.get("run_mode"))
    ours = section_of(settings, "model.model_config").get("type", "TelechatConfig") in TELECHAT_CONFIGS
    if facts.task is None or (facts.task == "run" and mode == "predict_with_train_model"):
        return None, None
    if facts.task == "run" and mode == "eval":
        notes += check_evaluation_settings(settings, facts.changed)
        return None, None
    if mode.startswith("predict"):
        return None, prediction_plan(settings, facts.devices) if ours else None
    if ours or facts.task == "plan":
        return check(settings, facts.devices), None
    check_all((check_optimization, settings), (check_parallel_sections, settings))
    return None, None
