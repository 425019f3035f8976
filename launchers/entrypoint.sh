#!/usr/bin/env bash
# What a pod runs: launchers/entrypoint.sh VERB CONFIG [a.b=c ...]
#
# torchrun's variables, which the manifests set and Kubeflow sets by itself, say which of the
# pods this is: PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE, PET_MASTER_ADDR, PET_MASTER_PORT.
# Waits until the name of the first pod is known, then hands over to multi_node.sh. After a
# SIGTERM the run is saved and the exit code is 138; see docs/kubernetes.md.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export NODES=${PET_NNODES:-1} NODE_RANK=${PET_NODE_RANK:-0}
export MASTER_ADDR=${PET_MASTER_ADDR:-127.0.0.1} MASTER_PORT=${PET_MASTER_PORT:-29500}
processes=${PET_NPROC_PER_NODE:-auto}
# Accelerate hands its arguments to torchrun's parser, which would read the variables again.
unset "${!PET_@}"

if ! [[ $NODES =~ ^[0-9]+$ ]]; then
  echo "PET_NNODES=$NODES is not a number: a run cannot grow or shrink while it lasts" >&2
  exit 2
fi
case "$processes" in
auto | gpu) ;; # multi_node.sh counts GPUs
cpu) PROCESSES=$(nproc) && export PROCESSES ;;
*) export PROCESSES=$processes ;;
esac

# Stopped here, nothing is lost: the code says that it may be started again.
trap 'exit 138' TERM
waited=0
until getent ahosts "$MASTER_ADDR" >/dev/null; do
  if [ "$waited" -ge "${DNS_WAIT_SECONDS:-600}" ]; then
    echo "The first pod's name $MASTER_ADDR is not known after $waited s: is there a headless" \
      "service that publishes addresses of pods that are not ready?" >&2
    exit 1
  fi
  sleep 1
  waited=$((waited + 1))
done
trap - TERM

exec "$here/multi_node.sh" "$@"
