#!/usr/bin/env bash
# Start a command on one or more devices, with MindFormers' positional arguments.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # started by sh

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
  PORT            port of node 0, which nothing else may use (8118)
  NODE_RANK       number of this node, from 0 (0)
  LOG_DIR         where worker_N.log is written (output/msrun_log)
  JOIN            True: show what the first worker shows, wait, and exit with the job's status;
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
((workers % local_workers == 0)) ||
    fail "WORKERS is $workers, which nodes of LOCAL_WORKERS $local_workers each do not make up; give a multiple."
((node < workers / local_workers || local_workers == workers)) ||
    fail "NODE_RANK is $node, but $workers workers, $local_workers on each node, are nodes 0 to $((workers / local_workers - 1))."
((port >= 1024 && port <= 65535)) || fail "PORT must lie between 1024 and 65535, got $port."

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
first=$((node * local_workers))
((local_workers == workers)) && first=0

listens() { # port: whether a program answers there
    local host
    for host in "$address" 127.0.0.1; do
        timeout 2 bash -c 'exec 3<>"/dev/tcp/$1/$2"' bash "$host" "$1" 2>/dev/null && return
    done
    return 1
}

# Node 0 opens the port; a second job there would wait for TIMEOUT seconds, and then name another reason.
if ((first == 0)) && listens "$port"; then
    for ((free = port + 1; free <= 65535; free++)); do
        listens "$free" || break
    done
    fail "PORT $port of $address is in use, perhaps by another job; $free is free:" \
        "give it as PORT, or end that job."
fi

log_dir=$log_dir${MF_LOG_SUFFIX:+_$MF_LOG_SUFFIX}
{ mkdir -p "$log_dir" && [[ -w "$log_dir" ]] && : >>"$log_dir/msrun.log"; } 2>/dev/null ||
    fail "cannot write into LOG_DIR $log_dir; give another one."
exec 9>>"$log_dir/msrun.log"
if command -v flock >/dev/null; then
    flock -n 9 || fail "another job writes its logs into $log_dir; give another LOG_DIR."
fi
: >"$log_dir/msrun.log" # what an earlier job left there is not of this one
export LOG_MF_PATH=$log_dir/mindformers
if [[ "${PLOG_REDIRECT_TO_OUTPUT:-}" == True ]]; then
    export ASCEND_PROCESS_LOG_PATH=$log_dir/plog
fi
bind_core=False # without NPUs msrun would pin every worker to a single core
command -v npu-smi >/dev/null && bind_core=True

# run_mindformer.py and run_telechat.py show their own lines only, and a worker's log has everything.
screen=""
if [[ " ${command[*]} " =~ (run_mindformer|run_telechat)\.py && " ${command[*]} " != *" --verbose "* ]]; then
    screen=$(cd "$log_dir" && pwd)/screen.log
    : >"$screen"
    export TELECHAT_SCREEN=$screen TELECHAT_FIRST_RANK=$first
fi
export TELECHAT_LOCAL_WORKERS=$local_workers

run_workers() {
    local tail_log=$first
    [[ -n "$screen" ]] && tail_log=-2 # none of them
    msrun --bind_core=$bind_core --worker_num="$workers" --local_worker_num="$local_workers" \
        --master_addr="$address" --master_port="$port" --node_rank="$node" --log_dir="$log_dir" \
        --join="$join" --tail_worker_log="$tail_log" --cluster_time_out="$timeout" "${command[@]}"
}

if [[ "$join" == False ]]; then
    run_workers
    status=$?
    ((status == 0)) || fail "msrun could not start the job (status $status)."
    shown=worker_$first.log
    [[ -n "$screen" ]] && shown=screen.log
    echo "started $local_workers workers in the background; follow them with: tail -f $log_dir/$shown"
    [[ -n "$screen" ]] && echo "all that a worker writes is in $log_dir/worker_N.log"
    exit 0
fi

# What a worker finds wrong it leaves here, and it is said once for all of them.
errors=$(mktemp -d) || fail "cannot create a temporary directory."
export TELECHAT_ERRORS=$errors

# When a worker has failed msrun ends the others, and waits for its scheduler, which waits for all workers.
end_scheduler() {
    local process
    until grep -q "exit with exception" "$log_dir/msrun.log" 2>/dev/null; do sleep 2; done
    sleep 3
    for process in /proc/[0-9]*; do
        if { tr '\0' '\n' <"$process/environ" | grep -cxF -e "TELECHAT_ERRORS=$errors" -e MS_ROLE=MS_SCHED; } 2>/dev/null |
            grep -qx 2; then
            kill "${process#/proc/}" 2>/dev/null
        fi
    done
}

helpers=()
end_scheduler >/dev/null 2>&1 9>&- &
helpers+=($!)
if [[ -n "$screen" ]]; then
    tail -n +1 -f "$screen" 2>/dev/null 9>&- &
    helpers+=($!)
fi
# Ctrl-C: a training finishes its step and saves; a second one, or one at another task, has msrun end the workers.
interrupted=False ended=False
interrupt() {
    if [[ $interrupted == False && -e "$errors/trains" ]]; then
        : >"$errors/stop"
        echo "Ctrl-C: this step is finished, and a checkpoint saved. Ctrl-C again: the end, at once." >&2
    else
        ended=True
        kill -INT -- "-$job" 2>/dev/null
    fi
    interrupted=True
}
set -m # msrun in a process group of its own, which a terminal's Ctrl-C does not reach
if [[ -n "$screen" ]]; then
    run_workers >>"$log_dir/msrun.log" 2>&1 &
else
    run_workers 2>>"$log_dir/msrun.log" &
fi
job=$!
set +m
trap interrupt INT
while :; do
    wait "$job"
    status=$?
    kill -0 "$job" 2>/dev/null || break # or a signal came
done
[[ -n "$screen" ]] && sleep 1 # tail looks once a second
kill "${helpers[@]}" 2>/dev/null
wait "${helpers[@]}" 2>/dev/null

worker_logs=()
for ((rank = first; rank < first + local_workers; rank++)); do
    [[ -f "$log_dir/worker_$rank.log" ]] && worker_logs+=("$log_dir/worker_$rank.log")
done

say_why() {
    local found signal
    if compgen -G "$errors/rank_*" >/dev/null; then
        # Sentences may have several lines; what other workers say as well is left out.
        awk '/^error:/ { shown = !seen[$0]++ } shown' "$errors"/rank_*
        return
    fi
    signal=$(grep -oE "Error code: -[0-9]+" "$log_dir/msrun.log" | grep -oE "[0-9]+" | head -n 1)
    if [[ -n "$signal" ]]; then
        [[ "$signal" == 9 ]] && signal="9, perhaps for want of memory"
        echo "error: a worker was ended by signal $signal; the logs are in $log_dir:"
    else
        echo "error: a worker failed; the last errors found in $log_dir:"
    fi
    found=$(grep -hE "^error:|Error: |CRITICAL|can't open file" "${worker_logs[@]}" /dev/null | sort -u | tail -n 5)
    echo "${found:-$(tail -n 5 "${worker_logs[0]:-$log_dir/msrun.log}")}"
}

if [[ $interrupted == True ]]; then
    if compgen -G "$errors/rank_*" >/dev/null; then
        say_why >&2 # the save has failed
    elif [[ $ended == True ]] || ((status != 0)); then
        echo "interrupted: the workers are ended; their logs are in $log_dir" >&2
    fi
    status=130
elif ((status != 0)); then
    say_why >&2
fi
rm -rf "$errors"
exit $status
