#!/bin/sh
# The same by the launcher: logs of all ranks, one first failure over both hosts, restarts.
#
#   node-a$ ./two_hosts.sh 0 node-a       node-b$ ./two_hosts.sh 1 node-a
set -eu
exec modelparallel run --nnodes 2 --node-rank "$1" --rendezvous "$2:${PORT:-29500}" --nproc "${NPROC:-8}" \
  --parameters '{"pipeline_parallel_degree": 2, "microbatches": 4, "ddp": true}' "${SCRIPT:-train.py}"
