#!/usr/bin/env bash
# Builds the site of docs/ into runs/site, in an environment of its own; a warning is an error.
# usage: scripts/docs.sh [argument of sphinx-build ...]
# PYTHON names a Python that has what pyproject.toml's extra `docs` names; then none is made.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${PYTHON:-}" ]; then
  source scripts/venv.sh
  make_venv "${VENV:-.venv-docs}" docs
  PYTHON="${VENV:-.venv-docs}/bin/python"
fi
export OMP_NUM_THREADS=1
"$PYTHON" docs/generate.py --check
exec "$PYTHON" -m sphinx -E -W --keep-going -q -b html "$@" docs runs/site
