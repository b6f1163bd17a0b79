#!/usr/bin/env bash
# Sets up and passes the tests: ruff, pyright, pytest. Arguments go to pytest.
# With --device cuda [--wheels DIR] [--src DIR], first of all arguments: those tests that take a device, on the card,
# with the Python at hand (PYTHON, default python3), without a virtual environment or linters.
set -euo pipefail
cd "$(dirname "$0")/.."

on_device() {
  local device='' options=() settings=()
  while [ $# -gt 0 ]; do
    case $1 in
      --device | --wheels | --src)
        [ $# -gt 1 ] || set -- "$1" ''
        [ "$1" != --device ] || device=$2
        options+=("$1" "$2")
        shift 2
        ;;
      *) break ;;
    esac
  done
  source scripts/cuda_env.sh
  prepare_cuda tests "${options[@]}"
  # Native Triton and its interpreter cannot share a process.
  if [ "$device" = cuda ]; then
    settings=(-u TRITON_INTERPRET CUBLAS_WORKSPACE_CONFIG=:4096:8)
  else
    settings=(TRITON_INTERPRET=1 OMP_NUM_THREADS=1)
  fi
  settings+=("TEST_DEVICE=$device" TORCHDYNAMO_DISABLE=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1)
  exec env "${settings[@]}" "$python" -m pytest -m device "$@"
}

[ "${1:-}" != --device ] || on_device "$@"
for word in "$@"; do
  case $word in
    --device | --device=* | --wheels | --wheels=* | --src | --src=*)
      echo "scripts/test.sh: $word: give --device cuda first, then --wheels DIR and --src DIR, then what pytest gets" >&2
      exit 2
      ;;
  esac
done

source scripts/venv.sh
# The old tool's wheel, a stand-in for its checkout (SPECFORGE_SRC) in the parity tests; without its dependencies.
make_venv "${VENV:-.venv-test}" test specforge==0.2.0 yunchang==0.6.4 triton==3.8.0
bin="${VENV:-.venv-test}/bin"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/pyright" --pythonpath "$bin/python"
exec "$bin/python" -m pytest "$@"
