#!/usr/bin/env bash
# From raw dialogues to answers on a CPU: tokenizer, data, fine-tuning, checkpoint conversion both ways, questions.

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
    cat <<USAGE
usage: bash scripts/quickstart.sh [--moe] [FOLDER]

Trains a small model on a hundred dialogues, converts it to torch names and back, and asks it every question.

  --moe    a small mixture of experts; without it, a small dense model
  FOLDER   a new folder for everything it makes, by default output/quickstart (output/quickstart_moe)
USAGE
}

model=tiny
work=""
for word in "$@"; do
    case "$word" in
        --moe) model=tiny_moe ;;
        -h | --help) usage && exit 0 ;;
        -*) echo "error: unknown option $word; expected --moe, or --help." >&2 && usage >&2 && exit 2 ;;
        *)
            [[ -z "$work" ]] || { echo "error: two folders are named, $work and $word; expected one." >&2 && exit 2; }
            work=$word
            ;;
    esac
done
default="$checkout/output/quickstart${model#tiny}"
if [[ -z "$work" ]]; then
    work=$default
    for ((number = 2; ; number++)); do
        [[ -e "$work" ]] || break
        work="$default-$number"
    done
elif [[ -e "$work" ]]; then
    echo "error: $work exists already; name a folder that does not, or none for ${default#"$checkout"/}." >&2
    exit 1
fi
[[ "$work" = /* ]] || work="$PWD/$work"

step() { printf '\n\033[1m%s\033[0m\n' "$*"; }

step "1/6 environment"
# shellcheck source=scripts/setup_env.sh
source "$checkout/scripts/setup_env.sh"
mkdir -p "$work"
cd "$work"
echo "python $(command -v python), results in $work"
telechat="$checkout/research/telechat2"
dialogues="$checkout/examples/dialogues.jsonl"

step "2/6 tokenizer: a small SentencePiece vocabulary with the released special ids"
python "$checkout/examples/train_tokenizer.py" --input "$dialogues" --output_path vocab

step "3/6 data: dialogues to records"
python "$telechat/telechat_preprocess.py" --input_dataset_file "$dialogues" \
    --vocab_file_path vocab/tokenizer.model --max_length 512 --output_path data/

step "4/6 fine-tuning through MindFormers' Trainer (every 10th loss line; all of them in train.log)"
: >train.log  # tail must find it, however late the training starts
python "$checkout/run_mindformer.py" --config "research/telechat2/telechat2-tiny/finetune_telechat_$model.yaml" \
    --train_dataset data/dataset.mindrecord --output_dir "$work/train" >>train.log 2>&1 &
training=$!
trap 'kill "$training" 2>/dev/null || true' EXIT
tail -n +1 -f --pid="$training" train.log 2>/dev/null |
    awk '/loss:\[/ { if (lines++ % 10 == 0) { sub(/.*INFO - /, ""); sub(/, overflow.*/, " }"); print; fflush() } }'
if ! wait "$training"; then
    grep -a '^error:' train.log >&2 || tail -n 20 train.log >&2
    echo "error: fine-tuning failed; all of its output is in $work/train.log." >&2
    exit 1
fi
trap - EXIT
echo "loss curve: $work/train/loss_curve.png   TensorBoard: tensorboard --logdir $work/train/tensorboard"

step "5/6 conversion: MindSpore to torch names, and back"
python "$telechat/convert_reversed.py" --mindspore_path train/checkpoint --torch_path torch
python "$telechat/convert_weight.py" --torch_path torch --mindspore_path mindspore

step "6/6 questions, to the checkpoint that went both ways"
ask=(--yaml_file "predict_telechat_$model.yaml" --vocab_file_path vocab/tokenizer.model
    --checkpoint_path mindspore/model.safetensors)
python "$checkout/examples/check_answers.py" "${ask[@]}" --input "$dialogues" --at_least 95
echo
python "$telechat/run_telechat_predict.py" "${ask[@]}" "生抽与老抽的区别？"
echo "Go on with a conversation: $(command -v python) $telechat/run_telechat_predict.py ${ask[*]}" | sed "s#vocab/#$work/vocab/#; s#mindspore/#$work/mindspore/#"
