#!/usr/bin/env bash
# Train with several processes on this machine.
#   launch/local.sh 2 train configs/runs/quickstart.yaml out=runs/two
# The first argument is the number of processes, the rest is a `mmssl` command.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
processes=$1
shift

python=${PYTHON:-python3}
if [[ -z ${PYTHON:-} && -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
# one share of the cores per process, so that they do not fight
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(getconf _NPROCESSORS_ONLN) + processes - 1) / processes))}
exec "$python" -m torch.distributed.run --standalone --nproc-per-node "$processes" -m mmssl.cli "$@"
