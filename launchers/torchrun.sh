#!/usr/bin/env bash
# One machine, through torchrun, which starts all ranks again when one dies:
# launchers/torchrun.sh VERB CONFIG [a.b=c ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
more_usage="  MAX_RESTARTS=N  times that all ranks are started again after one has died (default: 0);
                  the run goes on from its newest checkpoint
"
# shellcheck source=launchers/common.sh
source "$here/common.sh"
# Ranks that are started again would find the addresses of those that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ "$gpus" -eq 0 ]; then export ACCELERATE_USE_CPU=true; fi

exec "$python" -m torch.distributed.run --standalone --nproc_per_node "$processes" \
  --max_restarts "${MAX_RESTARTS:-0}" \
  -m cmkd_scale "$1" --config "$2" "${@:3}"
