#!/usr/bin/env bash
# Trains on a data set:  bash train.sh [Rain200L|Rain200H|DID-Data|DDN-Data|SPA-Data|demo] [options of train.py]
# An ablation:           bash train.sh ablation NAME [options], see train.py --help
# On several GPUs:       GPUS=4 bash train.sh Rain200L --batch_size 4
set -euo pipefail
cd "$(dirname "$0")"
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ]; then
    PATH="$PWD/.venv/bin:$PATH" # what `make demo` and `make test` installed
fi
dataset=Rain200L
if [ $# -gt 0 ] && [[ $1 != -* ]]; then
    dataset=$1
    shift
fi
if [ $# -eq 0 ] && [ ! -d "Datasets/$dataset" ]; then
    echo "To try training without a download: bash train.sh demo" >&2
fi
if [ "$dataset" = ablation ]; then
    set -- --dataset Rain200L --ablation "$@"
else
    set -- --dataset "$dataset" "$@"
fi
if [ "${GPUS:-1}" -gt 1 ]; then
    exec torchrun --standalone --nproc_per_node "$GPUS" train.py "$@"
fi
exec python train.py "$@"
