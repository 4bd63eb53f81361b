#!/usr/bin/env bash
# Runs a command, and again while it says that it can go on: how a run outlives what befalls its hosts.
#
#     restart.sh smoljax pretrain smollm2-135m run=/shared/135m data.sources=/shared/shards
#
# Start:  the same line on every host of the run; alone on one host too. Nothing to edit.
# Stop:   kill -TERM this script (or Ctrl-C, or close its terminal): the command saves and ends, and so does this, with
#         its exit code. Under nohup it outlives the terminal.
#
# Started again after PAUSE seconds (10):
#     75   preempted, a lost process, a watchdog: the same command goes on from the last checkpoint
#     134  the JAX runtime aborted: its coordinator died, or another process hangs
#     137  this process was killed without warning, as by a machine short of memory
# Any other code ends this with that code: 0 done, 1 failed, 2 usage or config, 3 data or weights, 4 checkpoints or a full
# disk, 130 Ctrl-C, 129 and 143 SIGHUP and SIGTERM before the training had begun. A training does not end with 141: it
# goes on when nobody reads what it says. The MAX_RESTARTS-th (3) restart in a row that brought no new checkpoint in
# RUN/checkpoints ends this too; RUN is what the command line says with run=DIR.
set -u -m # -m: the command is a process group of its own, so that a Ctrl-C reaches it once, from here

run=
for argument in "$@"; do
    [[ $argument == run=* ]] && run=${argument#run=}
done
if [[ -z $run ]]; then
    echo "restart.sh: expected a command that says run=DIR: restart.sh smoljax pretrain CONFIG run=DIR ..." >&2
    exit 2
fi

newest() { # the newest checkpoint's step; folders that are not yet whole have other names
    local folder step=0
    for folder in "$run"/checkpoints/*/; do
        folder=$(basename "$folder")
        [[ $folder =~ ^[0-9]+$ ]] && ((10#$folder > step)) && step=$((10#$folder))
    done
    echo "$step"
}

stop='' child=''
hear() {
    stop=yes again=yes
    [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}
trap hear TERM INT HUP

idle=0
while true; do
    before=$(newest)
    child='' code=127
    "$@" &
    child=$!
    [[ -z $stop ]] || kill -TERM "$child" 2>/dev/null # it came between the two lines above, or before
    while true; do # wait ends early when a signal comes; asked again it gives the code, or 127 for one given already
        again=
        wait "$child"
        got=$?
        ((got == 127)) || code=$got
        [[ -n $again ]] || break
    done
    [[ -z $stop ]] && ((code == 75 || code == 134 || code == 137)) || exit "$code"
    if [[ $(newest) == "$before" ]]; then idle=$((idle + 1)); else idle=0; fi
    if ((idle > ${MAX_RESTARTS:-3})); then
        echo "restart.sh: ${MAX_RESTARTS:-3} restarts in a row brought no checkpoint in $run/checkpoints: giving up" >&2
        exit "$code"
    fi
    echo "restart.sh: exit code $code, starting again in ${PAUSE:-10} s" >&2
    sleep "${PAUSE:-10}" &
    child=$!
    [[ -n $stop ]] || wait "$child"
    [[ -z $stop ]] || exit "$code"
done
