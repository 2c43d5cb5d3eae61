#!/usr/bin/env bash
# Start a command on one or more devices, with MindFormers' positional arguments.

usage() {
    cat >&2 <<'TEXT'
usage: bash scripts/msrun_launcher.sh COMMAND
       bash scripts/msrun_launcher.sh COMMAND WORKERS
       bash scripts/msrun_launcher.sh COMMAND WORKERS PORT LOG_DIR JOIN TIMEOUT
       bash scripts/msrun_launcher.sh COMMAND WORKERS LOCAL_WORKERS MASTER_ADDRESS PORT NODE_RANK LOG_DIR JOIN TIMEOUT

  COMMAND         one quoted string, such as "python run_mindformer.py --config … --use_parallel True"
  WORKERS         processes on all nodes together (8); 1 simply runs the command
  LOCAL_WORKERS   processes on this node (8)
  MASTER_ADDRESS  address of node 0 (127.0.0.1)
  PORT            port of node 0 (8118)
  NODE_RANK       number of this node, from 0 (0)
  LOG_DIR         where worker_N.log is written (output/msrun_log)
  JOIN            True: show the first worker's log, wait, and exit with the job's status;
                  False: return at once, the job goes on in the background (False)
  TIMEOUT         seconds to wait until all nodes have joined (7200)
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 1
}

whole_number() {  # name value
    [[ "$2" =~ ^(0|[1-9][0-9]*)$ ]] || fail "$1 must be a whole number, got '$2'."
}

workers=8 address=127.0.0.1 port=8118 node=0 log_dir=output/msrun_log join=False timeout=7200
case $# in
    1) ;;
    2) workers=$2 ;;
    6) workers=$2 port=$3 log_dir=$4 join=$5 timeout=$6 ;;
    9) workers=$2 address=$4 port=$5 node=$6 log_dir=$7 join=$8 timeout=$9 ;;
    *)
        echo "error: $# arguments given, expected 1, 2, 6 or 9." >&2
        usage
        exit 2
        ;;
esac
local_workers=$workers
[[ $# -eq 9 ]] && local_workers=$3

whole_number WORKERS "$workers"
whole_number LOCAL_WORKERS "$local_workers"
whole_number PORT "$port"
whole_number NODE_RANK "$node"
whole_number TIMEOUT "$timeout"
[[ "$join" == True || "$join" == False ]] || fail "JOIN must be True or False, got '$join'."
((workers >= 1)) || fail "WORKERS must be at least 1, got $workers."
((local_workers >= 1 && local_workers <= workers)) ||
    fail "LOCAL_WORKERS must lie between 1 and WORKERS ($workers), got $local_workers."

# An array literal reads the string as a shell would, quotes included, but takes a bare newline for a space:
# the README's command has one after its second line.
command=()
eval "command=( $1 )" 2>/dev/null || fail "COMMAND is not a command line a shell can read (an open quote?): $1"
((${#command[@]} > 0)) || fail "COMMAND is empty."

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

if ((workers == 1)); then
    "${command[@]}"
    exit
fi

command -v msrun >/dev/null || fail "msrun is not on the PATH: activate the environment in which mindspore is installed."
log_dir=$log_dir${MF_LOG_SUFFIX:+_$MF_LOG_SUFFIX}
mkdir -p "$log_dir" || fail "cannot create LOG_DIR $log_dir."
export LOG_MF_PATH=$log_dir/mindformers
if [[ "${PLOG_REDIRECT_TO_OUTPUT:-}" == True ]]; then
    export ASCEND_PROCESS_LOG_PATH=$log_dir/plog
fi
bind_core=False # without NPUs msrun would pin every worker to a single core
command -v npu-smi >/dev/null && bind_core=True
first=$((node * local_workers))
((local_workers == workers)) && first=0

run_workers() {
    msrun --bind_core=$bind_core --worker_num="$workers" --local_worker_num="$local_workers" \
        --master_addr="$address" --master_port="$port" --node_rank="$node" --log_dir="$log_dir" \
        --join="$join" --tail_worker_log="$first" --cluster_time_out="$timeout" "${command[@]}"
}

if [[ "$join" == False ]]; then
    run_workers
    status=$?
    ((status == 0)) || fail "msrun could not start the job (status $status)."
    echo "started $local_workers workers in the background;" \
        "follow them with: tail -f $log_dir/worker_$first.log"
    exit 0
fi

# What a worker finds wrong it leaves here, and it is said once for all of them.
errors=$(mktemp -d) || fail "cannot create a temporary directory."
export TELECHAT_ERRORS=$errors
interrupted=False
trap 'interrupted=True' INT # msrun ends the workers
run_workers 2>"$log_dir/msrun.log"
status=$?
if [[ $interrupted == True ]]; then
    echo "interrupted: the workers are ended; their logs are in $log_dir" >&2
    status=130
elif ((status != 0)); then
    if compgen -G "$errors/rank_*" >/dev/null; then
        # Sentences may have several lines; what other workers say as well is left out.
        awk '/^error:/ { shown = !seen[$0]++ } shown' "$errors"/rank_* >&2
    else
        echo "error: a worker failed; the last errors found in $log_dir:" >&2
        grep -hE "^error:|Error: |CRITICAL" "$log_dir"/worker_*.log | sort -u | tail -n 5 >&2
    fi
fi
rm -rf "$errors"
exit $status
