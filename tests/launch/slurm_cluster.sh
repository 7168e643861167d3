#!/usr/bin/env bash
# A real Slurm of two emulated nodes on this machine, for tests: without systemd, cgroups or a database, as root.
#
#   slurm_cluster.sh up DIR PORT PORT PORT    an empty folder with a short path; free ports of slurmctld and two slurmd
#   slurm_cluster.sh down DIR
#
# SLURM_CONF=DIR/slurm.conf makes Slurm's commands use it. Jobs of the partition `high` preempt those of `low`: these
# get the signal of their --signal option and, if they have not ended a minute later, are requeued.
set -euo pipefail
action=$1 dir=$2
host=$(hostname -s)

up() {
  mkdir -p "$dir"/{state,spool/node1,spool/node2,log,munge,socket}
  chmod 711 "$dir" && chmod 700 "$dir/munge" && chmod 755 "$dir/socket"
  # A munge of its own, with its own key.
  dd if=/dev/urandom of="$dir/munge/key" bs=1024 count=1 status=none
  chmod 400 "$dir/munge/key"
  munged --force --key-file="$dir/munge/key" --socket="$dir/socket/munge" --pid-file="$dir/munge/pid" \
    --log-file="$dir/munge/log" --seed-file="$dir/munge/seed"
  # cred_expire is also what a requeued job waits before it may start again: two minutes by default.
  cat >"$dir/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/socket/munge,cred_expire=5
SlurmctldPort=$1
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
FirstJobId=$((1000 + RANDOM))
KillWait=5
MinJobAge=600
NodeName=node1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$2 CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=node2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$3 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF State=UP
CONF
  export SLURM_CONF=$dir/slurm.conf
  slurmctld -c
  slurmd -N node1
  slurmd -N node2
  for _ in $(seq 100); do
    [[ $(sinfo --noheader --partition low --states idle --format %D 2>/dev/null) == 2 ]] && return
    sleep 0.2
  done
  echo "the nodes do not get ready:" >&2
  sinfo -N -l >&2 || true
  tail -n 20 "$dir"/log/* >&2
  return 1
}

down() {
  export SLURM_CONF=$dir/slurm.conf
  local pids=() pid
  timeout 10 scancel --user root || true
  for _ in $(seq 50); do
    [[ -z $(timeout 10 squeue --noheader || true) ]] && break
    sleep 0.2
  done
  for pid in "$dir"/slurmd.*.pid "$dir/slurmctld.pid" "$dir/munge/pid"; do
    [[ -s $pid ]] && pids+=("$(<"$pid")")
  done
  kill "${pids[@]}" 2>/dev/null || true
  for _ in $(seq 50); do
    kill -0 "${pids[@]}" 2>/dev/null || return 0
    sleep 0.1
  done
  kill -KILL "${pids[@]}" 2>/dev/null || true
}

"$action" "${@:3}"
