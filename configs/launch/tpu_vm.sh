#!/usr/bin/env bash
# Trains on a Cloud TPU VM, on all hosts of its slice. Runs on your own machine, in a checkout, with gcloud logged in.
#
#     export NAME=my-tpu ZONE=us-east5-b
#     configs/launch/tpu_vm.sh install                # what is committed here, to all hosts
#     configs/launch/tpu_vm.sh start smollm2-135m run=/shared/135m data.sources=/shared/shards
#     configs/launch/tpu_vm.sh logs                   # of host 0; Ctrl-C ends the looking, not the run
#     configs/launch/tpu_vm.sh stop                   # saves first; start again goes on
#
# Edit:   nothing. NAME and ZONE are the TPU's; where PROJECT is set it is used, else gcloud's own.
# /shared is a disk that all hosts mount at the same path: Filestore, or for shards alone Cloud Storage FUSE. Prepare
# the shards on any machine that sees it. A spot slice that was taken: create it anew, install, start; the run goes on.
set -eu

if [[ -z ${NAME:-} || -z ${ZONE:-} ]]; then
    echo "tpu_vm.sh: NAME and ZONE of the TPU VM are not set: export NAME=my-tpu ZONE=us-east5-b" >&2
    exit 2
fi
where=(--zone "$ZONE" ${PROJECT:+--project "$PROJECT"})

on() { # on all|0 COMMAND
    gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command "$2"
}

verb=${1:-}
[[ $# -gt 0 ]] && shift
case $verb in
install)
    folder=$(mktemp -d)
    trap 'rm -r "$folder"' EXIT
    git -C "$(dirname "$0")/../.." archive --format=tar.gz --prefix=smoljax/ --output="$folder/smoljax.tar.gz" HEAD
    gcloud compute tpus tpu-vm scp "$folder/smoljax.tar.gz" "$NAME:smoljax.tar.gz" "${where[@]}" --worker=all
    # The images' own Python may be 3.10, smoljax needs 3.11 or newer: uv brings one.
    on all 'set -e
        tar xzf smoljax.tar.gz
        test -x ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh
        test -d ~/smoljax-env || ~/.local/bin/uv venv -q --python 3.12 ~/smoljax-env
        ~/.local/bin/uv pip install -q --python ~/smoljax-env/bin/python -e "smoljax[tpu]"
        ~/smoljax-env/bin/smoljax --version'
    ;;
start)
    if [[ $# -eq 0 ]]; then
        echo "tpu_vm.sh: expected a config and run=DIR: tpu_vm.sh start smollm2-135m run=/shared/135m" >&2
        exit 2
    fi
    on all "if [ -s smoljax.pid ] && kill -0 \$(cat smoljax.pid) 2>/dev/null; then
            echo 'a run is at work on this host: stop it first' >&2
            exit 1
        fi
        export PATH=~/smoljax-env/bin:\$PATH
        exec >>smoljax.log 2>&1 </dev/null
        nohup bash smoljax/configs/launch/restart.sh smoljax pretrain$(printf ' %q' "$@") &
        echo \$! >smoljax.pid"
    ;;
logs) on 0 'tail -n 50 -f smoljax.log' ;;
stop) on all "kill -TERM \$(cat smoljax.pid)" ;;
*)
    echo "tpu_vm.sh: expected install, start, logs or stop, found '$verb'" >&2
    exit 2
    ;;
esac
