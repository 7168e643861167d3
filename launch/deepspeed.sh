#!/usr/bin/env bash
# launch/deepspeed.sh CONFIG [--section.key value ...]: train with DeepSpeed ZeRO, started by DeepSpeed's launcher.
#
#   launch/deepspeed.sh configs/digits.yaml --run.dir runs/mine --engine.zero_stage 2
#
# NPROC=2 sets the number of processes (default: the GPUs; 1 where there is none), MASTER_PORT their port (default:
# 29500). OMP_NUM_THREADS is their share of the cores unless it is set.
#
# HOSTFILE=FILE starts the processes on the machines of a hostfile (lines such as `host0 slots=8`) through pdsh and ssh.
#
# On one machine Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint after the current step and end with status 0. With a
# hostfile the launcher kills everything at once: make the file `stop` in run.dir instead. The same command goes on.
#
# The launcher is a matter of taste: launch/torchrun.sh CONFIG --engine.backend deepspeed trains the same.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/common.sh
check_config launch/deepspeed.sh "$@"
"$python" -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("deepspeed"))' ||
  fail "DeepSpeed is not installed; install it with pip install -e '.[deepspeed]'"

gpus=$(count_gpus)
processes=()
if [[ -n ${NPROC:-} ]]; then
  check_number NPROC "$NPROC"
  # Given a number, DeepSpeed takes the first GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says.
  [[ -z ${CUDA_VISIBLE_DEVICES:-} ]] || fail "set NPROC or CUDA_VISIBLE_DEVICES, not both"
  processes=(--num_gpus "$NPROC")
elif ((gpus == 0)); then
  processes=(--num_gpus 1) # DeepSpeed's own default is one process per NUMA node.
fi
share_threads "${NPROC:-$((gpus > 0 ? gpus : 1))}" "$(nproc)"

launcher=("$python" -m deepspeed.launcher.runner --master_port "${MASTER_PORT:-29500}" "${processes[@]}")
training=(--module train --config "$@" --engine.backend deepspeed)
if [[ -n ${HOSTFILE:-} ]]; then
  [[ -f $HOSTFILE ]] || fail "$HOSTFILE: no such hostfile"
  run "${launcher[@]}" --hostfile "$HOSTFILE" "${training[@]}"
fi
run "$python" -m launch.stoppable "${launcher[@]}" "${training[@]}"
