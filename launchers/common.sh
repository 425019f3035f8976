# shellcheck shell=bash
# Sourced by the launchers with their arguments: usage text, the interpreter (`python`), the
# number of GPUs (`gpus`) and of processes to start (`processes`).

usage() {
  cat <<EOF
usage: $0 VERB CONFIG [a.b=c ...]

Runs \`cmkd VERB --config CONFIG [a.b=c ...]\` on all GPUs of this machine, or on 2 CPU
processes where there is none.

  PROCESSES=N   number of processes (default: number of GPUs; 2 without a GPU)
  PYTHON=PATH   interpreter that has cmkd_scale (default: .venv/bin/python, else python3)

example: PROCESSES=2 $0 student configs/debug/student.yaml train.steps=20
EOF
}

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

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
# shellcheck disable=SC2034 # read by the launcher that sources this
processes=${PROCESSES:-$((gpus > 0 ? gpus : 2))}
# Without it, processes on CPUs would not join into one training but run one each.
if [ "$gpus" -eq 0 ]; then export ACCELERATE_USE_CPU=true; fi
