#!/usr/bin/env bash
# Sets up and passes the tests: ruff, pyright, pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
# The old tool's wheel, a stand-in for its checkout (SPECFORGE_SRC) in the parity tests; without its dependencies.
make_venv "${VENV:-.venv-test}" test specforge==0.2.0 yunchang==0.6.4 triton==3.8.0
bin="${VENV:-.venv-test}/bin"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/pyright" --pythonpath "$bin/python"
exec "$bin/python" -m pytest "$@"
