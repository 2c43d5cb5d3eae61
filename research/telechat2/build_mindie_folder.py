"""Build the folder that MindIE serves a model from: code, YAML, config.json, tokenizer, what to type.

    python research/telechat2/build_mindie_folder.py --yaml_file predict_telechat_7b_parallel.yaml \\
        --world_size 2 --checkpoint_path TeleChat2-7B --vocab_file_path TeleChat2-7B \\
        --output_path serving/telechat2_7b

The folder needs MindFormers, not this plugin; the weights stay where they are.
"""

import argparse
import runpy
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])  # run as a file from anywhere
if __name__ == "__main__":
    runpy.run_path(f"{sys.path[0]}/research/telechat2/common/environment.py")["main"](Path(__file__).name)

from research.telechat2.common.cli import quiet_libraries, run  # noqa: E402
from research.telechat2.common.errors import UsageError  # noqa: E402
from research.telechat2.config.overrides import boolean  # noqa: E402
from research.telechat2.config.yaml_files import resolve_config  # noqa: E402
from research.telechat2.text.prompt_format import PROMPT_FORMATS  # noqa: E402


def main() -> None:
    """Read the arguments, build, and print what is left to do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--yaml_file", required=True, help="predict YAML; a path, or the name of a shipped one"
    )
    parser.add_argument("--output_path", type=Path, required=True, help="the folder to make")
    parser.add_argument(
        "--checkpoint_path",
        type=Path,
        help="weights of any layout, torch or MindSpore; by default the YAML's load_checkpoint",
    )
    parser.add_argument(
        "--vocab_file_path",
        type=Path,
        help="tokenizer.model or the folder with it; by default the YAML's vocab_file",
    )
    parser.add_argument(
        "--prompt_format", choices=PROMPT_FORMATS, help="default: as recorded with the checkpoint"
    )
    parser.add_argument("--world_size", type=int, help="number of NPUs; by default the YAML's")
    parser.add_argument("--npu_mem_size", type=int, default=8, help="GB of each NPU for the cache; default 8")
    parser.add_argument(
        "--self_test",
        type=boolean,
        help="load the folder through ModelRunner and ask it; by default if the YAML's device_target is CPU",
    )
    arguments = parser.parse_args()
    for name in ("world_size", "npu_mem_size"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise UsageError(f"--{name} is {getattr(arguments, name)}; it must be at least 1.")
    yaml_file = resolve_config(arguments.yaml_file, Path.cwd())
    print(f"config: {yaml_file}", file=sys.stderr)
    quiet_libraries()
    from research.telechat2.serve.mindie.folder import build, read_folder_sources

    sources = read_folder_sources(
        yaml_file,
        arguments.checkpoint_path,
        arguments.vocab_file_path,
        arguments.prompt_format,
        arguments.world_size,
    )
    print(
        build(
            sources,
            arguments.output_path,
            npu_mem_size=arguments.npu_mem_size,
            self_test=arguments.self_test,
        ),
        end="",
    )


if __name__ == "__main__":
    run(main)
