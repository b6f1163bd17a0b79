#!/usr/bin/env bash
# Everything that one CUDA card is asked, in one call: smoke, parity, bench and profile, each a process of its own.
# usage: scripts/cuda_gate.sh all [--parts PART,…] [--minutes 5] [--device cuda|cpu] [--wheels DIR] [--src DIR]
#        [--out FILE] [--revision TEXT]
#   --parts       smoke, parity, bench, profile (the default) or updates: 20 updates of SpecForge's script against ours;
#                 failed:FILE repeats what did not pass in an earlier result, and adds updates
#   --minutes     for all parts together; the call ends within a minute more, whatever happens
#   --device cpu  a rehearsal of the same code on the CPU; it certifies nothing
#   --wheels DIR  install from these wheels alone, without a network; their hashes are checked all the same
#   --src DIR     a checkout of SpecForge at the commit of its pull request 600; without it SPECFORGE_SRC, or the wheel
#                 specforge in --wheels, or a clone in .cache/
#   --out FILE    one JSON file, rewritten after each part
#                 (default bench/results/DATE-cuda-gate.json, or runs/cuda-gate-rehearsal.json)
#   --revision    which revision this is, on a machine without git
# PYTHON (default python3) must have torch for CUDA, triton, transformers, pytest and hypothesis; what else is needed
# goes to .venv-cuda/. Exit code 0: every part passed; 1: something did not; 2: refused, nothing was begun.
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  all) ;;
  *)
    sed -n '3,18s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
for word in "$@"; do
  case $word in -h | --help) exec sed -n '2,18s/^# \{0,1\}//p' "$0" ;; esac
done
source scripts/cuda_env.sh
prepare_cuda gate "$@"
exec "$python" -m tests.gate.run "$@"
