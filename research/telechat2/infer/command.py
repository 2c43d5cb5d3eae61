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
    add = parser.add_argument
    add("question", nargs="*", help="each is answered by itself")
    add("--yaml_file", required=True, help="predict YAML; a path, or the name of a shipped one")
    add("--vocab_file_path", help="tokenizer.model; by default the YAML's, or that beside the weights")
    add("--checkpoint_path", help="weights of any layout; by default the YAML's load_checkpoint")
    add("--joined_for", type=int, metavar="N", help=JOINED_FOR)
    text = "a text file that is one question, or data as for --question_file"
    add("--input_txt", action="append", default=[], help=text)
    text = (
        "a text file with a question on each line, or data as for telechat_preprocess.py (.jsonl, .json, "
        "packed or not, directories): the last answer is cut off, and need not be there"
    )
    add("--question_file", action="append", default=[], help=text)
    add("--ignore_fields", metavar="A,B", help="fields of such data to leave out")
    add("--prompt_format", choices=PROMPT_FORMATS, help="default: as recorded with the checkpoint")
    text = 'system text (chat format) of conversations without one, "" for none; by default the format\'s own'
    add("--system", help=text)
    text = "share the model with the other processes of msrun_launcher.sh; by default the YAML's"
    add("--use_parallel", type=boolean, help=text)
    for name in ("--auto_trans_ckpt", "--src_strategy_path_or_dir"):  # of older instructions
        add(name, help=argparse.SUPPRESS)
    add("--use_past", type=boolean, help="predict with a cache; by default the YAML's")
    add("--device_id", type=int, help="by default the YAML's")
    add("--batch_size", type=int, default=1, help="questions of a file answered at once")
    add("--max_new_tokens", type=int, help="tokens of an answer")
    text = "tokens of prompt and answer; by default max_decode_length, or seq_length with --max_new_tokens"
    add("--max_length", type=int, help=text)
    for name, how in zip(SAMPLING, (boolean, float, int, float, float), strict=True):
        add(f"--{name}", type=how, help="by default the YAML's")
    add("--seed", type=int, help="of sampling; by default the YAML's")
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
    for files, read in ((args.input_txt, asking.read_prompts), (args.question_file, asking.read_questions)):
        for file in files:
            questions += read(file, args.system, ignored_fields(args.ignore_fields))
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
            f"--src_strategy_path_or_dir {args.src_strategy_path_or_dir}: no weights are sliced here; merge "
            "slices of training with research/telechat2/transform_ckpt.py."
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
                raise UsageError(f"--{name} {given} does not exist; give a question itself without --{name}.")
    for text in args.question:
        if exists(text) and Path(text).is_file():
            print(
                f"note: {text} is asked as a text; --question_file {text} asks the lines of the file, "
                "--input_txt asks it as one question.",
                file=sys.stderr,
            )
    check_sampling(vars(args))


def _converse(predictor, args: argparse.Namespace) -> None:
    """Talk to a person at a terminal."""
    from research.telechat2.infer.chat import chat
    from research.telechat2.infer.terminal import Terminal, history_file, note

    terminal, config = Terminal(history_file()), predictor.model.config
    draws = predictor.generation.get("do_sample", config.do_sample)
    note(
        f"TeleChat2: {args.yaml_file} ({config.num_layers} layers, width {config.hidden_size}) with the "
        f"weights {predictor.checkpoint}, prompt format {predictor.prompt_format}, "
        f"{'drawing tokens' if draws else 'taking the likeliest tokens'}.\n"
        "Type a question. /help lists the commands; Ctrl-C stops an answer; /exit leaves."
    )
    alone = processes_of_run() == 1  # msrun ends its processes at Ctrl-C
    chat(predictor, args.system, predictor.group.lines(terminal.lines()), terminal if alone else None)
