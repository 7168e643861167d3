#!/usr/bin/env bash
# launch/torchrun.sh CONFIG [--section.key value ...]: train with one process per GPU of this machine, under torchrun.
#
#   launch/torchrun.sh configs/quickstart.yaml --run.dir runs/mine
#
# NPROC=2 sets the number of processes (default: the GPUs; 1 where there is none). OMP_NUM_THREADS is their share of the
# cores unless it is set.
#
# On several machines give the same command on each of them, with their number and a free port of one of them:
#
#   NNODES=2 RDZV_ENDPOINT=host0:29400 launch/torchrun.sh configs/quickstart.yaml --run.dir /shared/runs/mine
#
# Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint after the current step and end with status 0; on several machines one of
# them is enough. The same command goes on from there. docs/launching.md has more.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
check_config launch/torchrun.sh "$@"

if [[ -z ${NPROC:-} ]]; then
  NPROC=$(count_gpus)
  ((NPROC)) || NPROC=1
fi
check_number NPROC "$NPROC"
share_threads "$NPROC" "$(nproc)"

if [[ ${NNODES:-1} == 1 ]]; then
  meet=(--standalone)
else
  check_number NNODES "$NNODES"
  [[ -n ${RDZV_ENDPOINT:-} ]] || fail "NNODES is $NNODES; set RDZV_ENDPOINT to HOST:PORT of one of the machines as well"
  meet=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$RDZV_ENDPOINT" --rdzv-id "${RDZV_ID:-ropeway}")
fi

run "$python" -m launch.stoppable \
  "$python" -m torch.distributed.run "${meet[@]}" --nproc-per-node "$NPROC" -m train --config "$@"
