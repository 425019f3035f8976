#!/usr/bin/env bash
# One machine, through torchrun: launchers/torchrun.sh VERB CONFIG [a.b=c ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launchers/common.sh
source "$here/common.sh"

exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$processes" \
  -m cmkd_scale "$1" --config "$2" "${@:3}"
