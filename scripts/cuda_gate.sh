#!/usr/bin/env bash
# All checks and measurements on one CUDA card: smoke, parity, bench, profile, each a process.
# usage: scripts/cuda_gate.sh all [--parts PART,…] [--minutes 5] [--device cuda|cpu] [--wheels DIR]
#        [--src DIR] [--out FILE] [--revision TEXT]
#   --parts       some of smoke, parity, bench, profile (the default) and updates, which compares
#                 20 updates of SpecForge's script with ours; failed:FILE repeats the parts of an
#                 earlier result that did not pass, and adds updates
#   --minutes     for all parts together; the call ends at most a minute later
#   --device cpu  a rehearsal of the same code on the CPU; it certifies nothing
#   --wheels DIR  install from these wheels alone, without a network; their hashes are checked too
#   --src DIR     a checkout of SpecForge at the commit of its pull request 600; without it
#                 SPECFORGE_SRC, or the wheel specforge in --wheels, or a clone in .cache/
#   --out FILE    one JSON file, rewritten after each part (default
#                 bench/results/DATE-cuda-gate.json, or runs/cuda-gate-rehearsal.json)
#   --revision    the revision's name, on a machine without git
# PYTHON (default python3) must have torch for CUDA, triton, transformers, pytest and hypothesis;
# other packages go to .venv-cuda/. Exit code 0: every part passed; 1: one did not; 2: refused,
# nothing was begun.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '3,19s/^# \{0,1\}//p' scripts/cuda_gate.sh
}

case ${1:-} in
  all) ;;
  *)
    usage >&2
    exit 2
    ;;
esac
for word in "$@"; do
  case $word in
    -h | --help)
      usage
      exit 0
      ;;
  esac
done

source scripts/cuda_env.sh
prepare_cuda gate "$@"
exec "$python" -m tests.gate.run "$@"
