#!/usr/bin/env bash
# The tests in their own environment: ruff, pyright, then pytest on the installed wheel.
# Arguments go to pytest; without any, all tests run in two processes.
# usage: scripts/test.sh [argument of pytest ...]
#        scripts/test.sh --device cuda|cpu [--wheels DIR] [--src DIR] [argument of pytest ...]
#        scripts/test.sh --engines [argument of pytest ...]
# With --device, first of all arguments: the tests that take a device, on that device, with the
# Python at hand (PYTHON, default python3), without a virtual environment, a wheel or linters.
# With --engines, first of all arguments: the tests that need a serving engine, on tiny models. The
# engines' environments are made in .venv-engines (several GB) and used again; VLLM_PYTHON,
# LLAMACPP_PYTHON and LLAMACPP_SRC name some that are there.
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
  settings+=("TEST_DEVICE=$device" TORCHDYNAMO_DISABLE=1)
  settings+=(TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1)
  exec env "${settings[@]}" "$python" -m pytest -m device "$@"
}

in_engines() {
  local places
  places=$("$venv/bin/python" -m tests.serving .venv-engines)
  while IFS= read -r place; do
    export "${place?}"
  done <<<"$places"
  test_wheel "$venv" -m engines "$@"
}

engines=''
if [ "${1:-}" = --engines ]; then
  engines=yes
  shift
fi
[ "${1:-}" != --device ] || on_device "$@"
for word in "$@"; do
  case $word in
    --engines)
      echo "$0: $word: give it first, and not with --device" >&2
      exit 2
      ;;
    --device | --device=* | --wheels | --wheels=* | --src | --src=*)
      echo "$0: $word: give --device cuda first, then --wheels DIR and --src DIR," \
        "then the arguments of pytest" >&2
      exit 2
      ;;
  esac
done

source scripts/venv.sh
# SpecForge's wheel, in place of its checkout (SPECFORGE_SRC), and without its dependencies.
venv=${VENV:-.venv-test}
make_venv "$venv" test specforge==0.2.0 yunchang==0.6.4 triton==3.8.0
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
[ -z "$engines" ] || in_engines "$@"
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/pyright" --pythonpath "$venv/bin/python"
test_wheel "$venv" "$@"
