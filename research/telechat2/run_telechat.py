"""Train or fine-tune a TeleChat2 model with a few arguments; run_mindformer.py takes all of MindFormers'."""

import argparse
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

from research.telechat2.common.cli import run as run_command  # noqa: E402
from research.telechat2.config.overrides import boolean, boolean_or_text  # noqa: E402
from research.telechat2.run.task import TRAINING, VERBOSE, run  # noqa: E402

# argument, the key of the YAML it sets, how argparse reads it
ARGUMENTS = (
    ("--run_mode", "run_mode", {"choices": TRAINING, "help": "train or finetune; the YAML's by default"}),
    (
        "--use_parallel",
        "use_parallel",
        {"type": boolean, "help": "several devices, started by msrun_launcher.sh"},
    ),
    ("--device_id", "context.device_id", {"type": int, "help": "the device to use"}),
    ("--load_checkpoint", "load_checkpoint", {"help": ".safetensors or .ckpt file, or a directory"}),
    ("--src_strategy", "src_strategy_path_or_dir", {"help": "parallel plan the weights were saved under"}),
    (
        "--auto_trans_ckpt",
        "auto_trans_ckpt",
        {"type": boolean, "help": "slice the weights for this parallel plan"},
    ),
    (
        "--resume",
        "resume_training",
        {"type": boolean_or_text, "help": "continue the run of --load_checkpoint"},
    ),
    (
        "--train_dataset",
        "train_dataset.data_loader.dataset_dir",
        {"help": ".mindrecord file, or a directory"},
    ),
    ("--output_dir", "output_dir", {"help": "where checkpoints and logs go; the YAML's by default"}),
    ("--remote_save_url", "remote_save_url", {"help": "ModelArts: where to upload the output"}),
)


def main() -> None:
    """Read the arguments and carry out the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    # text_generation is what the model is trained for; the older command named it, so it is still accepted
    parser.add_argument(
        "--task", choices=["text_generation"], default="text_generation", help="the only task"
    )
    parser.add_argument("--config", required=True, help="finetune YAML: a path, or the name of a shipped one")
    parser.add_argument("--verbose", action="store_true", help=VERBOSE)
    for flag, _, how in ARGUMENTS:
        parser.add_argument(flag, **how)
    arguments = vars(parser.parse_args())
    run(
        arguments["config"],
        {key: arguments[flag[2:]] for flag, key, _ in ARGUMENTS if arguments[flag[2:]] is not None},
        verbose=arguments["verbose"],
    )


if __name__ == "__main__":
    run_command(main)
