#!/usr/bin/env bash
# Makes every result of README's "Speed and memory" again, and the tables in README.
# One thread, one process at a time; alone on a machine it takes about 15 minutes.
# usage: SPECFORGE_SRC=CHECKOUT scripts/bench.sh [FOLDER]    FOLDER: features/ and vocab.safetensors of scripts/demo.sh,
# for the demo's own steps. CACHE names its cache of targets (runs/cache), PYTHON the interpreter, ROUNDS timed rounds.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python}" cache="${CACHE:-runs/cache}"
step() { "$python" -m bench.step --draft-vocab 16384 --rounds "${ROUNDS:-3}" "$@"; }
step --seq 1024 --masked 0
step --seq 1024 --masked 0.5 --mesh
step --seq 512 --batch 2 --masked 0.75
step --seq 1024 --masked 0 --allocator default --no-memory
step --seq 1024 --masked 0.5 --allocator default --no-memory
step --seq 512 --batch 2 --masked 0.75 --allocator default --no-memory
"$python" -m bench.loss --rounds 3
"$python" -m bench.attention --rounds 3
"$python" -m bench.scaling --rounds 2
if [ $# -gt 0 ]; then
  "$python" -m bench.demo --target "$cache/smollm2-135m-instruct" --features "$1/features" --vocab "$1/vocab.safetensors"
fi
"$python" -m bench.table --readme
