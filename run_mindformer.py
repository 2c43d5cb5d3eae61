"""MindFormers' entry for every task, with its own arguments, working from this checkout.

Any further ``--section.key value`` overrides that key of the YAML.
"""

import argparse
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent)  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

from research.telechat2.checkpoint.convert import JOINED_FOR  # noqa: E402
from research.telechat2.checkpoint.layouts.read import assume_joined_for  # noqa: E402
from research.telechat2.common.cli import run as run_command  # noqa: E402
from research.telechat2.config.overrides import boolean, boolean_or_text, parse_options, parse_overrides  # noqa: E402
from research.telechat2.config.preflight import RUN_MODES  # noqa: E402
from research.telechat2.config.yaml_files import join_overrides  # noqa: E402
from research.telechat2.run.task import VERBOSE, run  # noqa: E402

# argument, the key of the YAML it sets, how argparse reads it
ARGUMENTS = (
    ("--run_mode", "run_mode", {"choices": RUN_MODES, "help": "the task"}),
    ("--mode", "context.mode", {"type": int, "help": "0, static graph, is the only one TeleChat2 runs in"}),
    ("--device_id", "context.device_id", {"type": int, "help": "the device to use"}),
    ("--device_target", "context.device_target", {"choices": ("Ascend", "CPU"), "help": "where to run"}),
    (
        "--use_parallel",
        "use_parallel",
        {"type": boolean, "help": "several devices, started by msrun_launcher.sh"},
    ),
    ("--train_dataset_dir", "train_dataset.data_loader.dataset_dir", {"help": "training data"}),
    ("--eval_dataset_dir", "eval_dataset.data_loader.dataset_dir", {"help": "evaluation data"}),
    ("--do_eval", "do_eval", {"type": boolean, "help": "evaluate while training"}),
    (
        "--predict_data",
        "input_data",
        {
            "nargs": "+",
            "action": "extend",
            "help": "prompts, or one text file with a prompt on each line",
        },
    ),
    ("--predict_batch_size", "predict_batch_size", {"type": int, "help": "prompts answered at once"}),
    (
        "--do_sample",
        "model.model_config.do_sample",
        {"type": boolean, "help": "sample instead of greedy decoding"},
    ),
    ("--load_checkpoint", "load_checkpoint", {"help": ".safetensors or .ckpt file, or a directory"}),
    (
        "--resume_training",
        "resume_training",
        {"type": boolean_or_text, "help": "continue the run of --load_checkpoint"},
    ),
    (
        "--auto_trans_ckpt",
        "auto_trans_ckpt",
        {"type": boolean, "help": "slice the weights for this parallel plan"},
    ),
    ("--src_strategy_path_or_dir", "src_strategy_path_or_dir", {"help": "plan the weights were saved under"}),
    ("--strategy_load_checkpoint", "parallel.strategy_ckpt_load_file", {"help": "parallel plan to load"}),
    (
        "--transform_process_num",
        "transform_process_num",
        {"type": int, "help": "processes that slice weights"},
    ),
    ("--only_save_strategy", "only_save_strategy", {"type": boolean, "help": "compile, save the plan, stop"}),
    ("--remote_save_url", "remote_save_url", {"help": "ModelArts: where to upload the output"}),
    ("--output_dir", "output_dir", {"help": "where everything is written"}),
    ("--epochs", "runner_config.epochs", {"type": int, "help": "passes over the data"}),
    ("--batch_size", "runner_config.batch_size", {"type": int, "help": "records per device and step"}),
    (
        "--gradient_accumulation_steps",
        "runner_config.gradient_accumulation_steps",
        {"type": int, "help": "steps whose gradients are summed"},
    ),
    ("--sink_mode", "runner_config.sink_mode", {"type": boolean, "help": "feed the data on the device"}),
    ("--num_samples", "train_dataset.data_loader.num_samples", {"type": int, "help": "records to use"}),
    ("--seed", "seed", {"type": int, "help": "seed of every random number"}),
    ("--profile", "profile", {"type": boolean, "help": "record a profile"}),
)

UNSUPPORTED = {
    "--modal_type": "the TeleChat2 models read text only; leave it out",
    "--adapter_id": "the TeleChat2 models here have no LoRA adapters; leave it out",
    "--trust_remote_code": "the tokenizer is this project's, no code is downloaded; leave it out",
}


def named(options: dict[str, object]) -> dict[str, object]:
    """``--options epochs=2`` as if ``--epochs 2`` had been given."""
    keys = {flag[2:]: key for flag, key, _ in ARGUMENTS}
    return {keys.get(name, name): value for name, value in options.items()}


def main() -> None:
    """Read the arguments and carry out the task."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="YAML: a path, or the name of a shipped one")
    parser.add_argument(
        "--register_path", help="directory of the model's code; research/telechat2 by default"
    )
    parser.add_argument("--joined_for", type=int, metavar="N", help=JOINED_FOR)
    parser.add_argument("--options", nargs="+", default=[], help="key=value …, the older form of --key value")
    parser.add_argument("--verbose", action="store_true", help=VERBOSE)
    for flag, _, how in ARGUMENTS:
        parser.add_argument(flag, **how)
    for flag in UNSUPPORTED:
        parser.add_argument(flag, nargs="+", help=argparse.SUPPRESS)
    arguments, further = parser.parse_known_args()
    for flag, reason in UNSUPPORTED.items():
        if getattr(arguments, flag[2:]) is not None:
            parser.error(f"{flag} has no meaning here: {reason}")
    given = {key: value for flag, key, _ in ARGUMENTS if (value := getattr(arguments, flag[2:])) is not None}
    overrides = join_overrides(given, named(parse_options(arguments.options)), parse_overrides(further))
    assume_joined_for(arguments.joined_for)
    run(arguments.config, overrides, arguments.register_path, arguments.verbose)


if __name__ == "__main__":
    run_command(main)
