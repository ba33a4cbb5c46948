#!/usr/bin/env bash
# A real Slurm on this machine alone, without systemd: cluster.sh up|down ROOT. Two nodes of eight
# cores and four GPUs (null devices), accounting, and a partition `high` whose jobs preempt those of
# `main`. A step ends soon after its first process, unless srun is told otherwise. Everything it writes lies below ROOT, but for names in /etc/hosts while it is up.
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
  mkdir -p "$root"/{state,spool-n1,spool-n2,dev}
  # Slurm talks to its nodes, and ranks to rank 0, by name.
  for name in "$host" n1 n2; do
    getent hosts "$name" >/dev/null || echo "127.0.0.1 $name $mark" >> /etc/hosts
  done
  address=$(getent ahostsv4 "$host" | awk 'NR==1{print $1}')
  configure
  start_munge
  start_accounting
  slurmctld
  slurmd -N n1
  slurmd -N n2
  wait_for idle
}

configure() {
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
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$((port + 3))
AccountingStoragePass=$root/munge.socket
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
KillWait=5
WaitTime=2
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=$address Port=$((port + 1)) CPUs=8 RealMemory=64000 Gres=gpu:4 Features=fake
NodeName=n2 NodeHostname=$host NodeAddr=$address Port=$((port + 2)) CPUs=8 RealMemory=64000 Gres=gpu:4 Features=fake
PartitionName=main Nodes=n[1-2] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=n[1-2] State=UP PriorityTier=10 PreemptMode=OFF
CONF
  for i in 0 1 2 3; do
    # Slurm only wants them to be there.
    mknod "$root/dev/nvidia$i" c 1 3 2>/dev/null || touch "$root/dev/nvidia$i"
  done
  printf 'AutoDetect=off\nName=gpu File=%s\n' "$root/dev/nvidia[0-3]" > "$root/gres.conf"
}

start_munge() {
  (umask 077; head -c 128 /dev/urandom > "$root/munge.key")
  munged --force --key-file="$root/munge.key" --socket="$root/munge.socket" \
    --pid-file="$root/munged.pid" --log-file="$root/munged.log" --seed-file="$root/munge.seed"
}

start_accounting() {
  mariadb-install-db --no-defaults --user="$me" --datadir="$root/db" --skip-test-db \
    --auth-root-authentication-method=normal > "$root/db-install.log" 2>&1
  setsid mariadbd --no-defaults --user="$me" --datadir="$root/db" --socket="$root/db.socket" \
    --pid-file="$root/mariadbd.pid" --bind-address=127.0.0.1 --port=$((port + 4)) \
    --innodb-buffer-pool-size=64M --innodb-flush-log-at-trx-commit=0 \
    --innodb-lock-wait-timeout=900 > "$root/mariadbd.log" 2>&1 < /dev/null &
  wait_for mariadb --no-defaults -u root -S "$root/db.socket" -e "
    CREATE DATABASE IF NOT EXISTS slurm;
    CREATE USER IF NOT EXISTS slurm@'127.0.0.1' IDENTIFIED BY 'slurm';
    CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED BY 'slurm';
    GRANT ALL ON slurm.* TO slurm@'127.0.0.1'; GRANT ALL ON slurm.* TO slurm@localhost"
  (umask 077; cat > "$root/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$root/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=$((port + 3))
SlurmUser=$me
LogFile=$root/slurmdbd.log
PidFile=$root/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$((port + 4))
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm
CommunicationParameters=NoInAddrAny
CONF
  )
  slurmdbd
  wait_for sacctmgr -n -i list cluster
  sacctmgr -i add cluster simpo > /dev/null
}

idle() { [ "$(sinfo -h -N -p main -o %T | grep -c idle)" = 2 ]; }

down() {
  scancel --full -u "$me" || true
  for name in slurmd-n1 slurmd-n2 slurmctld slurmdbd mariadbd munged; do
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
