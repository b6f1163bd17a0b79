#!/usr/bin/env bash
# The tests with the oldest or the newest versions of dependencies, as scripts/lanes/ lists them.
# usage: scripts/lane.sh oldest|newest [argument of pytest ...]
# A lane has its own environment, .venv-oldest or .venv-newest (some GB), made once for each list.
# PYTHON names the interpreter (default python3), HYPOTHESIS_PROFILE the profile: dev, ci (the
# default) or nightly.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
  sed -n '2,6s/^# //p' scripts/lane.sh
}

case ${1-} in
  oldest | newest) lane=$1 ;;
  -h | --help)
    usage
    exit 0
    ;;
  *)
    echo "$0: lane '${1-}': must be oldest or newest, then arguments of pytest; see --help" >&2
    exit 2
    ;;
esac
shift
for word in "$@"; do
  case $word in
    -h | --help)
      usage
      exit 0
      ;;
  esac
done
case ${HYPOTHESIS_PROFILE-ci} in
  dev | ci | nightly) ;;
  *)
    echo "$0: HYPOTHESIS_PROFILE '$HYPOTHESIS_PROFILE': must be dev, ci or nightly" >&2
    exit 2
    ;;
esac

source scripts/venv.sh
# SpecForge's wheel as in scripts/test.sh. Triton without dependencies: torch for CPUs has none.
TORCH=torch CONSTRAINTS=scripts/lanes/$lane.txt
make_venv ".venv-$lane" test specforge==0.2.0 yunchang==0.6.4 triton
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
test_wheel ".venv-$lane" "$@"
