#!/usr/bin/env bash
# A real Slurm of two nodes on this machine alone, without systemd: cluster.sh up|down ROOT.
# Everything it writes lies below ROOT, but for the nodes' names in /etc/hosts while it is up.
# Then: export SLURM_CONF=ROOT/slurm.conf
set -euo pipefail
action=$1 root=$2
port=${SLURM_TEST_PORT:-17817}
host=$(hostname -s)
me=$(id -un)
mark="# simpo's tests: $root"
export SLURM_CONF=$root/slurm.conf

pid_of() { [ -s "$root/$1.pid" ] && cat "$root/$1.pid"; }

wait_for() {
  for _ in $(seq 100); do "$@" >/dev/null 2>&1 && return; sleep 0.2; done
  tail -n 5 "$root"/*.log >&2
  return 1
}

up() {
  mkdir -p "$root"
  # Slurm talks to its nodes, and ranks to rank 0, by name.
  for name in "$host" n1 n2; do
    getent hosts "$name" >/dev/null || echo "127.0.0.1 $name $mark" >> /etc/hosts
  done
  address=$(getent ahostsv4 "$host" | awk 'NR==1{print $1}')
  cat > "$SLURM_CONF" <<CONF
ClusterName=simpo
SlurmctldHost=$host($address)
SlurmctldPort=$port
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$root/munge.socket
CredType=cred/munge
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$root/state
SlurmctldPidFile=$root/slurmctld.pid
SlurmctldLogFile=$root/slurmctld.log
SlurmdPidFile=$root/slurmd-%n.pid
SlurmdLogFile=$root/slurmd-%n.log
SlurmdSpoolDir=$root/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=2,batch_sched_delay=0
ReturnToService=2
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname=$host NodeAddr=$address Port=$((port + 1)) CPUs=8 RealMemory=64000
NodeName=n2 NodeHostname=$host NodeAddr=$address Port=$((port + 2)) CPUs=8 RealMemory=64000
PartitionName=main Nodes=n[1-2] Default=YES State=UP
CONF
  mkdir -p "$root"/{state,spool-n1,spool-n2}
  (umask 077; head -c 128 /dev/urandom > "$root/munge.key")
  munged --force --key-file="$root/munge.key" --socket="$root/munge.socket" \
    --pid-file="$root/munged.pid" --log-file="$root/munged.log" --seed-file="$root/munge.seed"
  slurmctld
  slurmd -N n1
  slurmd -N n2
  wait_for idle
}

idle() { [ "$(sinfo -h -N -o %T | grep -c idle)" = 2 ]; }

down() {
  scancel --full -u "$me" || true
  for name in slurmd-n1 slurmd-n2 slurmctld munged; do
    pid=$(pid_of $name) || continue
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  done
  if grep -qF "$mark" /etc/hosts; then
    names=$(grep -vF "$mark" /etc/hosts)
    printf '%s\n' "$names" > /etc/hosts
  fi
}

"$action"
