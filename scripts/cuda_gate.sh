#!/usr/bin/env bash
# On one CUDA GPU: `parity` holds the legacy numerics against the old tool, bit for bit; `bench` measures speed.
# usage: scripts/cuda_gate.sh parity|bench [--out FILE] [--wheels DIR] [--src DIR] [option of the module ...]
#   --wheels DIR  install from these wheels alone, without a network; their hashes are checked all the same
#   --src DIR     a checkout of SpecForge at the commit of its pull request 600; without it, and without --wheels,
#                 one is cloned into .cache/; with --wheels alone the wheel specforge stands in
#   --out FILE    default bench/results/DATE-cuda-parity.json or DATE-cuda-bench.json
# PYTHON (default python3) must have torch for CUDA and transformers; what else is needed goes to .venv-cuda/.
set -euo pipefail
cd "$(dirname "$0")/.."
commit=7a81ce53a0381c6438fd19d6e247d34c68497012

usage() {
  sed -n '2,9s/^# //p' "$0" >&2
  exit 2
}

fail() {
  echo "scripts/cuda_gate.sh: $*" >&2
  exit 2
}

[ $# -gt 0 ] || usage
gate=$1 wheels='' src='' out=''
shift
case $gate in parity | bench) ;; *) usage ;; esac
rest=()
while [ $# -gt 0 ]; do
  case $1 in
    --wheels | --src | --out)
      [ $# -gt 1 ] || fail "$1 wants a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    -h | --help) usage ;;
    *)
      rest+=("$1")
      shift
      ;;
  esac
done
python=${PYTHON:-python3}
[ -z "$wheels" ] || [ -d "$wheels" ] || fail "--wheels $wheels: no such folder"
[ -z "$src" ] || [ -f "$src/specforge/optimizer.py" ] || fail "--src $src: no checkout of SpecForge there"
for package in torch transformers; do
  "$python" -c "import importlib.util as u; raise SystemExit(u.find_spec('$package') is None)" ||
    fail "$python has no $package; install it, or name another Python by PYTHON"
done
if [ "$gate" = bench ] && [ ! -f bench/cuda_gate.py ]; then
  fail "bench/cuda_gate.py is not in this checkout, so there is nothing to measure with"
fi

# Everything goes over the Python's own packages by PYTHONPATH; nothing there is changed.
site=$PWD/.venv-cuda/site
source=(--no-index --find-links "$wheels")
[ -n "$wheels" ] || source=()
rm -rf "$site"
"$python" -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target "$site" \
  "${source[@]}" --requirement scripts/cuda-requirements.txt
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

if [ -z "$src" ] && [ -z "$wheels" ]; then
  src=.cache/specforge
  [ -d "$src" ] || git clone --quiet https://github.com/sgl-project/SpecForge "$src"
  git -C "$src" checkout --quiet "$commit"
fi
[ -z "$src" ] || SPECFORGE_SRC=$(cd "$src" && pwd)
export SPECFORGE_SRC=${SPECFORGE_SRC:-}

out=${out:-bench/results/$(date +%F)-cuda-$gate.json}
module=eagle3fn.testing.cuda_gate
[ "$gate" = parity ] || module=bench.cuda_gate
exec "$python" -m "$module" --out "$out" ${rest[@]+"${rest[@]}"}
