#!/usr/bin/env bash
# One machine, through accelerate: launchers/one_node.sh VERB CONFIG [a.b=c ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launchers/common.sh
source "$here/common.sh"

config=$here/accelerate/ddp.yaml
if [ "$gpus" -eq 0 ]; then config=$here/accelerate/ddp_cpu_2.yaml; fi

exec "$python" -m accelerate.commands.accelerate_cli launch \
  --config_file "$config" --num_processes "$processes" \
  -m cmkd_scale "$1" --config "$2" "${@:3}"
