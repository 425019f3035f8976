# shellcheck shell=bash
# Sourced by the launchers with their arguments: usage text, the interpreter (`python`), the
# number of GPUs (`gpus`) and of processes to start on this machine (`processes`), and what
# `accelerate launch` has to be told for the backend (`backend`).

usage() {
  cat <<EOF_USAGE
usage: $0 VERB CONFIG [a.b=c ...]

Runs \`cmkd VERB --config CONFIG [a.b=c ...]\` on all GPUs of $machines, or on 2 CPU
processes where there is none.

  PROCESSES=N   processes on each machine (default: number of GPUs; 2 without a GPU)
  PYTHON=PATH   interpreter that has cmkd_scale (default: .venv/bin/python, else python3)
$more_usage
example: $example
EOF_USAGE
}

machines=${machines:-this machine}
more_usage=${more_usage:-}
example=${example:-PROCESSES=2 $0 student configs/debug/student.yaml train.steps=20}

case "${1:-}" in -h | --help)
  usage
  exit 0
  ;;
esac
if [ $# -lt 2 ]; then
  usage >&2
  exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if [ -z "${PYTHON:-}" ] && [ ! -x "$python" ]; then python=python3; fi

gpus=0 # if CUDA_VISIBLE_DEVICES is set, and empty
if [ -n "${CUDA_VISIBLE_DEVICES-all}" ]; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
fi
# shellcheck disable=SC2034 # read by the launcher that sources this
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}

# Sets `backend` to the options of `accelerate launch` for $BACKEND.
choose_backend() {
  local name=${BACKEND:-ddp}
  # shellcheck disable=SC2034 # read by the launcher that sources this
  case "$name" in
  ddp)
    backend=(--config_file "$root/launchers/accelerate/ddp.yaml")
    if [ "$gpus" -eq 0 ]; then
      backend=(--config_file "$root/launchers/accelerate/ddp_cpu_2.yaml")
    fi
    ;;
  fsdp2) backend=(--config_file "$root/launchers/accelerate/fsdp2.yaml") ;;
  zero1 | zero2 | zero3 | zero3_offload)
    # The option is absolute, unlike the path in launchers/accelerate/zero*.yaml.
    backend=(--use_deepspeed --deepspeed_config_file "$root/launchers/deepspeed/$name.json"
      --mixed_precision no --dynamo_backend no)
    ;;
  *)
    echo "BACKEND=$name is unknown: ddp, fsdp2, zero1, zero2, zero3 or zero3_offload" >&2
    exit 2
    ;;
  esac
  if [ "$gpus" -eq 0 ]; then
    # Processes on CPUs would not join into one training but run one each without the one
    # variable, and DeepSpeed would take each for alone with it.
    case "$name" in
    zero*)
      unset ACCELERATE_USE_CPU
      export DS_ACCELERATOR=cpu
      ;;
    *) export ACCELERATE_USE_CPU=true ;;
    esac
  fi
}
