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
    add = parser.add_argument
    add("--yaml_file", required=True, help="predict YAML; a path, or the name of a shipped one")
    add("--output_path", type=Path, required=True, help="the folder to make")
    add("--checkpoint_path", type=Path, help="weights of any layout; by default the YAML's load_checkpoint")
    text = "tokenizer.model or the folder with it; by default the YAML's, or that beside the weights"
    add("--vocab_file_path", type=Path, help=text)
    add("--prompt_format", choices=PROMPT_FORMATS, help="default: as recorded with the checkpoint")
    add("--world_size", type=int, help="number of NPUs; by default the YAML's")
    add("--npu_mem_size", type=int, default=8, help="GB of each NPU for the cache; default 8")
    text = "load the folder through ModelRunner and ask it; by default if the YAML's device_target is CPU"
    add("--self_test", type=boolean, help=text)
    arguments = vars(parser.parse_args())
    for name in ("world_size", "npu_mem_size"):
        if arguments[name] is not None and arguments[name] < 1:
            raise UsageError(f"--{name} is {arguments[name]}; it must be at least 1.")
    yaml_file = resolve_config(arguments["yaml_file"], Path.cwd())
    print(f"config: {yaml_file}", file=sys.stderr)
    quiet_libraries()
    from research.telechat2.serve.mindie.folder import build, read_folder_sources

    names = ("checkpoint_path", "vocab_file_path", "prompt_format", "world_size")
    sources = read_folder_sources(yaml_file, *map(arguments.get, names))
    settings = {name: arguments[name] for name in ("npu_mem_size", "self_test")}
    print(build(sources, arguments["output_path"], **settings), end="")


if __name__ == "__main__":
    run(main)
