#!/usr/bin/env bash
# Train on this machine: one process per GPU, or one where there is none.
#   launch/local.sh [PROCESSES] train configs/runs/quickstart.yaml out=runs/mine [key=value ...]
# Ends with exit code 75 after SIGTERM or SIGUSR1: a checkpoint is written, the same command goes on.
set -euo pipefail

python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
if [[ ${1-} =~ ^[1-9][0-9]*$ ]]; then
    processes=$1
    shift
else
    processes=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')
fi
if [[ $# -eq 0 ]]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
# one share of the cores per process, so that they do not fight
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes))}
exec "$python" -m mmssl.launch --standalone --nproc-per-node "$processes" -m mmssl.cli "$@"
