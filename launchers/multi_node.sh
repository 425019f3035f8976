#!/usr/bin/env bash
# The same on each of several machines: launchers/multi_node.sh VERB CONFIG [a.b=c ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
machines="each of NODES machines"
more_usage="  BACKEND=NAME  ddp (default), fsdp2, zero1, zero2, zero3, zero3_offload
  NODES=N       number of machines
  NODE_RANK=R   of this one, 0 to N-1
  MASTER_ADDR=A address of machine 0, seen from all
  MASTER_PORT=P a port that is free there (default: 29500)

Start it on all machines; run.dir must be on a file system that all of them share. Where a
machine has several networks, name the one to use: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME.
"
example="NODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 $0 student configs/numbers/student.yaml"
# shellcheck source=launchers/common.sh
source "$here/common.sh"
for name in NODES NODE_RANK MASTER_ADDR; do
  if [ -z "${!name:-}" ]; then
    echo "$name is not set" >&2
    usage >&2
    exit 2
  fi
done
choose_backend
case "${BACKEND:-ddp}" in zero*) backend+=(--deepspeed_multinode_launcher standard) ;; esac

exec "$python" -P "$here/accelerate_launch.py" launch "${backend[@]}" \
  --num_machines "$NODES" --num_processes "$((NODES * processes))" --machine_rank "$NODE_RANK" \
  --main_process_ip "$MASTER_ADDR" --main_process_port "${MASTER_PORT:-29500}" \
  --rdzv_backend static \
  -m cmkd_scale "$1" --config "$2" "${@:3}"
