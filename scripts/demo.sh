#!/usr/bin/env bash
# The main job on a fresh machine: from a small real target to a draft that it verifies, then a report.
# usage: scripts/demo.sh [--minutes N] [--out FOLDER] [--synthesize]      (--help lists all options)
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/venv.sh
make_venv .venv-demo demo
# Large temporaries stay in the heap; otherwise page faults cost a quarter of a step and more (bench/LOG.md).
export MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
export TOKENIZERS_PARALLELISM=false
exec .venv-demo/bin/python scripts/demo.py "$@"
