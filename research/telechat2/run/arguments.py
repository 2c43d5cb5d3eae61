"""The arguments of run_telechat.py and run_mindformer.py: each sets a key of the YAML."""

import argparse
from collections.abc import Callable, Container

from research.telechat2.config.overrides import boolean, boolean_or_text
from research.telechat2.config.preflight import RUN_MODES

_DATA = {"help": ".mindrecord file, or a directory of them"}
# flag, or its spellings in both commands; the key of the YAML that it sets; how argparse reads it
ARGUMENTS = (
    ("--run_mode", "run_mode", {"choices": RUN_MODES, "help": "the task; the YAML's by default"}),
    ("--use_parallel", "use_parallel",
     {"type": boolean, "help": "several devices, started by msrun_launcher.sh"}),
    ("--device_id", "context.device_id", {"type": int, "help": "the device to use"}),
    ("--device_target", "context.device_target", {"choices": ("Ascend", "CPU"), "help": "where to run"}),
    ("--load_checkpoint", "load_checkpoint", {"help": ".safetensors or .ckpt file, or a directory"}),
    ("--resume_training --resume", "resume_training",
     {"type": boolean_or_text, "help": "continue the run of --load_checkpoint"}),
    ("--train_dataset_dir --train_dataset", "train_dataset.data_loader.dataset_dir", _DATA),
    ("--eval_dataset_dir", "eval_dataset.data_loader.dataset_dir", _DATA),
    ("--do_eval", "do_eval", {"type": boolean, "help": "evaluate while training"}),
    ("--predict_data", "input_data",
     {"nargs": "+", "action": "extend", "help": "prompts, or one text file with a prompt on each line"}),
    ("--predict_batch_size", "predict_batch_size", {"type": int, "help": "prompts answered at once"}),
    ("--do_sample", "model.model_config.do_sample",
     {"type": boolean, "help": "sample instead of greedy decoding"}),
    ("--output_dir", "output_dir", {"help": "where everything is written; the YAML's by default"}),
    ("--epochs", "runner_config.epochs", {"type": int, "help": "passes over the data"}),
    ("--batch_size", "runner_config.batch_size", {"type": int, "help": "records per device and step"}),
    ("--gradient_accumulation_steps", "runner_config.gradient_accumulation_steps",
     {"type": int, "help": "steps whose gradients are summed"}),
    ("--sink_mode", "runner_config.sink_mode", {"type": boolean, "help": "feed the data on the device"}),
    ("--num_samples", "train_dataset.data_loader.num_samples", {"type": int, "help": "records to use"}),
    ("--seed", "seed", {"type": int, "help": "seed of every random number"}),
    ("--profile", "profile", {"type": boolean, "help": "record a profile"}),
    ("--only_save_strategy", "only_save_strategy",
     {"type": boolean, "help": "compile, save the plan, stop"}),
    ("--remote_save_url", "remote_save_url", {"help": "ModelArts: where to upload the output"}),
)  # fmt: skip


def _refused(reason: str) -> Callable[[str], object]:
    def read(value: str) -> object:
        raise argparse.ArgumentTypeError(f"it has no meaning here: {reason}")

    return read


_RESHARD = "transform_ckpt.py re-shards a sharded checkpoint, and any other layout is read as it is"
# flags of older commands, which --help does not list: flag, key, how argparse reads it, what to use instead
LEGACY = (
    ("--mode", "context.mode", {"type": int}, "the models run in static graph mode only; leave it out"),
    ("--auto_trans_ckpt", "auto_trans_ckpt", {"type": boolean}, _RESHARD),
    ("--src_strategy_path_or_dir --src_strategy", "src_strategy_path_or_dir", {}, _RESHARD),
    ("--strategy_load_checkpoint", "parallel.strategy_ckpt_load_file", {}, _RESHARD),
    ("--transform_process_num", "transform_process_num", {"type": int}, _RESHARD),
    ("--modal_type", "", {"type": _refused("the TeleChat2 models read text only; leave it out")}, ""),
    ("--adapter_id", "", {"type": _refused("the models here have no LoRA adapters; leave it out")}, ""),
    ("--trust_remote_code", "", {"type": _refused("no code is downloaded; leave it out")}, ""),
)  # fmt: skip

# of run_telechat.py
FEW = (
    "run_mode", "use_parallel", "device_id", "load_checkpoint", "resume_training", "train_dataset_dir",
    "output_dir", "remote_save_url", "auto_trans_ckpt", "src_strategy_path_or_dir",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser, names: Container[str] | None = None) -> None:
    """Add the arguments to a command: those of ``names``, or all."""
    for spellings, _, how, *legacy in (*ARGUMENTS, *LEGACY):
        if names is None or _name(spellings) in names:
            how = how | ({"help": argparse.SUPPRESS} if legacy else {})
            parser.add_argument(*spellings.split(), **how)


def overrides_of(arguments: argparse.Namespace) -> dict[str, object]:
    """Dotted key -> value of the arguments that are given; prints what to use instead of older ones."""
    given = {flag: value for flag, value in vars(arguments).items() if value is not None}
    found = {key: given[_name(flag)] for flag, key, _ in ARGUMENTS if _name(flag) in given}
    for flag, key, _, instead in LEGACY:
        if _name(flag) in given:
            print(f"note: --{_name(flag)} is of older commands: {instead}.", flush=True)
            found[key] = given[_name(flag)]
    return found


def renamed(options: dict[str, object]) -> dict[str, object]:
    """``--options epochs=2`` as if ``--epochs 2`` had been given."""
    keys = {_name(flag): key for flag, key, *_ in (*ARGUMENTS, *LEGACY) if key}
    return {keys.get(name, name): value for name, value in options.items()}


def _name(spellings: str) -> str:
    return spellings.split()[0][2:]
