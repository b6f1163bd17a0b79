#!/usr/bin/env bash
# Makes every result of docs/speed.md again, in bench/results, and its table.
# One thread, one process working at a time; run it alone on a machine.
# usage: SPECFORGE_SRC=CHECKOUT SPECFORGE_MAIN_SRC=CHECKOUT scripts/bench.sh [FOLDER]
# SPECFORGE_SRC is at its pull request 600, SPECFORGE_MAIN_SRC at its main branch; speculators is installed into
# .venv-peers. What is not at hand is left out, and said. FOLDER: features/ and vocab.safetensors of scripts/demo.sh, for
# the demo's own steps. CACHE names its cache of targets (runs/cache), PYTHON the interpreter, ROUNDS timed rounds.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python}" cache="${CACHE:-runs/cache}"
step() { "$python" -m bench.step --rounds "${ROUNDS:-3}" --out bench/results "$@"; }
step --draft-vocab 16384 --seq 1024 --masked 0 --peers
step --draft-vocab 16384 --seq 1024 --masked 0.5 --peers --mesh
step --draft-vocab 16384 --seq 512 --batch 2 --masked 0.75 --peers
step --draft-vocab 8192 --seq 512 --masked 0 --peers
step --draft-vocab 8192 --seq 512 --masked 0.5 --peers
step --draft-vocab 16384 --seq 1024 --masked 0 --allocator default --no-memory
step --draft-vocab 16384 --seq 1024 --masked 0.5 --allocator default --no-memory
step --draft-vocab 16384 --seq 512 --batch 2 --masked 0.75 --allocator default --no-memory
"$python" -m bench.loss --rounds 3 --out bench/results
"$python" -m bench.attention --rounds 3 --out bench/results
"$python" -m bench.scaling --rounds 2 --out bench/results
if [ $# -gt 0 ]; then
  "$python" -m bench.demo --target "$cache/smollm2-135m-instruct" --features "$1/features" --vocab "$1/vocab.safetensors" \
    --out bench/results
fi
"$python" -m bench.table --pages
