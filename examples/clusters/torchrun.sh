#!/bin/sh
# One job on two hosts by torchrun alone: no job folder, no log of each rank, and each host tells only its own failures.
#
#   node-a$ ./torchrun.sh 0 node-a        node-b$ ./torchrun.sh 1 node-a
#
# node-a is a name or an address of node 0 that both hosts reach, and that is not of the loopback.
set -eu
exec torchrun --nnodes 2 --node-rank "$1" --master-addr "$2" --master-port "${PORT:-29500}" \
  --nproc-per-node "${NPROC:-8}" "${SCRIPT:-train.py}"
