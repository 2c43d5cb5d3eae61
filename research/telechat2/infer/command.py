"""Ask a TeleChat2 model: questions on the command line, a file of them, or a conversation.

    python research/telechat2/run_telechat_predict.py --yaml_file predict_telechat_7b.yaml \\
        --vocab_file_path tokenizer.model --checkpoint_path model.safetensors "生抽与老抽的区别？"

Without a question it reads them from standard input and keeps the conversation; ``/help`` lists its commands.
Answers go to standard output, figures to standard error. Several processes share the model:

    bash scripts/msrun_launcher.sh "python research/telechat2/run_telechat_predict.py --yaml_file \\
        predict_telechat_7b.yaml --checkpoint_path TeleChat2-7B --use_parallel True 生抽与老抽的区别？" 2
"""

import argparse
import io
import os
import sys
from pathlib import Path

from research.telechat2.checkpoint.convert import JOINED_FOR
from research.telechat2.checkpoint.layouts.read import assume_joined_for
from research.telechat2.common.cli import quiet_libraries
from research.telechat2.common.errors import UsageError
from research.telechat2.config.optimization import check_seed
from research.telechat2.config.overrides import boolean
from research.telechat2.config.sampling import SAMPLING, check_sampling
from research.telechat2.config.sharing import processes_of_run
from research.telechat2.config.yaml_files import resolve_config
from research.telechat2.infer.sources import exists
from research.telechat2.text.prompt_format import PROMPT_FORMATS


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("question", nargs="*", help="each is answered by itself")
    parser.add_argument(
        "--yaml_file", required=True, help="predict YAML; a path, or the name of a shipped one"
    )
    parser.add_argument(
        "--vocab_file_path",
        help="tokenizer.model; by default the YAML's vocab_file, or that beside the weights",
    )
    parser.add_argument(
        "--checkpoint_path", help="weights of any layout; by default the YAML's load_checkpoint"
    )
    parser.add_argument("--joined_for", type=int, metavar="N", help=JOINED_FOR)
    parser.add_argument(
        "--input_txt",
        action="append",
        default=[],
        help="a text file that is one question, or data as for --question_file",
    )
    parser.add_argument(
        "--question_file",
        action="append",
        default=[],
        help="a text file with a question on each line, or data as for telechat_preprocess.py (.jsonl, "
        ".json, packed or not, directories): the last answer is cut off, and need not be there",
    )
    parser.add_argument("--ignore_fields", metavar="A,B", help="fields of such data to leave out")
    parser.add_argument(
        "--prompt_format", choices=PROMPT_FORMATS, help="default: as recorded with the checkpoint"
    )
    parser.add_argument(
        "--system",
        help='system text of conversations without one (chat format); "" is empty. '
        "Without it they are asked with the chat format's own, which is printed",
    )
    parser.add_argument(
        "--use_parallel",
        type=boolean,
        help="share the model with the other processes of msrun_launcher.sh; by default the YAML's",
    )
    for name in ("--auto_trans_ckpt", "--src_strategy_path_or_dir"):  # of older instructions
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument(
        "--use_past", type=boolean, default=None, help="predict with a cache; by default the YAML's"
    )
    parser.add_argument("--device_id", type=int, help="by default the YAML's")
    parser.add_argument("--batch_size", type=int, default=1, help="questions of a file answered at once")
    parser.add_argument("--max_new_tokens", type=int, help="tokens of an answer")
    parser.add_argument(
        "--max_length",
        type=int,
        help="tokens of prompt and answer together; by default the YAML's max_decode_length, or with "
        "--max_new_tokens its seq_length",
    )
    for name, how in (
        ("do_sample", boolean), ("temperature", float), ("top_k", int), ("top_p", float),
        ("repetition_penalty", float),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=how, help="by default the YAML's")
    parser.add_argument("--seed", type=int, help="of sampling; by default the YAML's")
    return parser.parse_args()


def main() -> None:
    """Load once, then answer what was asked."""
    args = parse_arguments()
    _check(args)
    yaml_file = resolve_config(args.yaml_file, Path.cwd())
    print(f"config: {yaml_file}", file=sys.stderr)
    assume_joined_for(args.joined_for)
    quiet_libraries()
    from research.telechat2.data.job import ignored_fields
    from research.telechat2.infer import chat as asking
    from research.telechat2.infer.loading import load_predictor

    questions = [asking.question(text, args.system) for text in args.question]
    for file in args.input_txt:
        questions += asking.read_prompts(file, args.system, ignored_fields(args.ignore_fields))
    for file in args.question_file:
        questions += asking.read_questions(file, args.system, ignored_fields(args.ignore_fields))
    predictor = load_predictor(
        yaml_file,
        args.vocab_file_path,
        args.checkpoint_path,
        prompt_format=args.prompt_format,
        max_length=args.max_length,
        device_id=args.device_id,
        batch_size=args.batch_size,
        use_past=args.use_past,
        use_parallel=args.use_parallel,
        generation={name: getattr(args, name) for name in ("max_new_tokens", *SAMPLING)},
        seed=args.seed,
    )
    if not predictor.group.first:
        sys.stdout = io.StringIO()  # one process speaks for all
    sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is not asked, and named
    asking.name_settings_without_effect(predictor)
    if questions:
        asking.name_system_texts(predictor, questions, args.system)
        asking.answer_all(predictor, questions, args.batch_size)
    elif sys.stdin.isatty():
        _converse(predictor, args)
    elif refused := asking.chat(predictor, args.system, predictor.group.lines(sys.stdin)):
        raise UsageError(f"{refused} lines of standard input were not asked; see above.")


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot be meant, before anything is read."""
    if args.src_strategy_path_or_dir:
        raise UsageError(
            f"--src_strategy_path_or_dir {args.src_strategy_path_or_dir}: weights of any layout are read as "
            "they are, but slices of training are not; merge those with research/telechat2/transform_ckpt.py."
        )
    if args.device_id is not None and "MS_ROLE" in os.environ:
        raise UsageError(f"--device_id {args.device_id}: each process of msrun_launcher.sh has its own.")
    for name in ("batch_size", "max_new_tokens", "max_length"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UsageError(f"--{name} is {getattr(args, name)}; it must be at least 1.")
    check_seed(args.seed, "--seed")
    for name in ("input_txt", "question_file"):
        for given in getattr(args, name):
            if not Path(given).expanduser().exists():
                raise UsageError(
                    f"--{name} {given} does not exist; a question itself is given without --{name}."
                )
    for text in args.question:
        if exists(text) and Path(text).is_file():
            print(
                f"note: {text} is asked as it stands, as a text; --question_file {text} asks the lines of "
                "the file, --input_txt asks it as one question.",
                file=sys.stderr,
            )
    check_sampling(vars(args))


def _converse(predictor, args: argparse.Namespace) -> None:
    """Talk to a person at a terminal."""
    from research.telechat2.infer import chat as asking
    from research.telechat2.infer.terminal import Terminal, history_file

    terminal = Terminal(history_file())
    print(_banner(args.yaml_file, predictor), file=sys.stderr)
    alone = processes_of_run() == 1  # msrun ends its processes at Ctrl-C
    asking.chat(predictor, args.system, predictor.group.lines(terminal.lines()), terminal if alone else None)


def _banner(yaml_file: str, predictor) -> str:
    config = predictor.model.config
    draws = predictor.generation.get("do_sample", config.do_sample)
    return (
        f"TeleChat2: {yaml_file} ({config.num_layers} layers, width {config.hidden_size}) with the weights "
        f"{predictor.checkpoint}, prompt format {predictor.prompt_format}, "
        f"{'drawing tokens' if draws else 'taking the likeliest tokens'}.\n"
        f"Type a question. /help lists the commands; Ctrl-C stops an answer; /exit leaves."
    )
