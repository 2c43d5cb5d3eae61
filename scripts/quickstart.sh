#!/usr/bin/env bash
# From raw dialogues to answers on a CPU: tokenizer, data, fine-tuning, checkpoint conversion both ways, questions.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<USAGE
usage: bash scripts/quickstart.sh [--moe] [--yes] [FOLDER]

Trains a small model on a hundred dialogues, converts it to torch names and back, and asks it every question.

  --moe    a small mixture of experts; without it, a small dense model
  --yes    install what is missing into the active environment without asking
  FOLDER   a new folder for everything it makes, by default output/quickstart (output/quickstart_moe);
           one that an interrupted quickstart left unfinished is made again
USAGE
}

model=tiny
work=""
for word in "$@"; do
    case "$word" in
        --moe) model=tiny_moe ;;
        --yes) setup_unasked=install ;;
        -h | --help) usage && exit 0 ;;
        -*) echo "error: unknown option $word; expected --moe, --yes, or --help." >&2 && usage >&2 && exit 2 ;;
        *)
            [[ -z "$work" ]] || { echo "error: two folders are named, $work and $word; expected one." >&2 && exit 2; }
            work=$word
            ;;
    esac
done

# A folder in the making holds this file, with the number of the process that makes it.
unfinished=.quickstart_unfinished
made=(vocab data train torch mindspore) # all that a quickstart makes

is_left_over() { # folder: whether a quickstart was interrupted in it
    [[ -f "$1/$unfinished" ]] && ! kill -0 "$(<"$1/$unfinished")" 2>/dev/null
}

default="$checkout/output/quickstart${model#tiny}"
if [[ -z "$work" ]]; then
    work=$default
    for ((number = 2; ; number++)); do
        [[ -e "$work" ]] && ! is_left_over "$work" || break
        work="$default-$number"
    done
elif [[ -e "$work" ]] && ! is_left_over "$work"; then
    echo "error: $work exists already; name a folder that does not, or none for ${default#"$checkout"/}." >&2
    exit 1
fi
[[ "$work" = /* ]] || work="$PWD/$work"

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

quoted() { # words: as a shell reads them, in the letters they have
    local word line=""
    for word in "$@"; do
        case "$word" in
            "" | *[\ \'\"\\\$\`\&\|\;\<\>\(\)\*\?\[\]\{\}~#!]*) line+=" '${word//\'/\'\\\'\'}'" ;;
            *) line+=" $word" ;;
        esac
    done
    echo "${line# }"
}

step "1/6 environment"
# shellcheck source=scripts/setup_env.sh
source "$checkout/scripts/setup_env.sh"
mkdir -p "$work"
if [[ -f "$work/$unfinished" ]]; then
    echo "$work was left unfinished by an interrupted quickstart; it is made again"
    for name in "${made[@]}"; do rm -rf "${work:?}/$name"; done
fi
echo "$$" >"$work/$unfinished"
cd "$work"
echo "python $(command -v python), results in $work"
telechat="$checkout/research/telechat2"
dialogues="$checkout/examples/dialogues.jsonl"

step "2/6 tokenizer: a small SentencePiece vocabulary with the released special ids"
python "$checkout/examples/train_tokenizer.py" --input "$dialogues" --output_path vocab

step "3/6 data: dialogues to records"
python "$telechat/telechat_preprocess.py" --input_dataset_file "$dialogues" \
    --vocab_file_path vocab/tokenizer.model --max_length 512 --output_path data/

step "4/6 fine-tuning through MindFormers' Trainer"
python "$checkout/run_mindformer.py" --config "research/telechat2/telechat2-tiny/finetune_telechat_$model.yaml" \
    --train_dataset data/dataset.mindrecord --output_dir "$work/train"

step "5/6 conversion: MindSpore to torch names, and back"
python "$telechat/convert_reversed.py" --mindspore_path train/checkpoint --torch_path torch
python "$telechat/convert_weight.py" --torch_path torch --mindspore_path mindspore

step "6/6 questions, to the checkpoint that went both ways"
ask=(--yaml_file "predict_telechat_$model.yaml" --vocab_file_path "$work/vocab/tokenizer.model"
    --checkpoint_path "$work/mindspore/model.safetensors")
python "$checkout/examples/check_answers.py" "${ask[@]}" --input "$dialogues" --at_least 95
echo
python "$telechat/run_telechat_predict.py" "${ask[@]}" "生抽与老抽的区别？"
rm -f "$work/$unfinished"
echo "Go on with a conversation: $(quoted "$(command -v python)" "$telechat/run_telechat_predict.py" "${ask[@]}")"
