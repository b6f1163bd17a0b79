#!/usr/bin/env bash
# Sets up and passes the tests: ruff, pyright, pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
make_venv "${VENV:-.venv-test}" test
bin="${VENV:-.venv-test}/bin"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/pyright" --pythonpath "$bin/python"
exec "$bin/python" -m pytest "$@"
