#!/usr/bin/env bash
# One machine, through accelerate: launchers/one_node.sh VERB CONFIG [a.b=c ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
more_usage="  BACKEND=NAME  ddp (default), fsdp2, zero1, zero2, zero3, zero3_offload
"
# shellcheck source=launchers/common.sh
source "$here/common.sh"
choose_backend

exec "$python" -P "$here/accelerate_launch.py" launch \
  "${backend[@]}" --num_processes "$processes" --num_machines 1 --main_process_port "${MASTER_PORT:-0}" \
  -m cmkd_scale "$1" --config "$2" "${@:3}"
