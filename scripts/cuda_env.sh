# Sourced: `prepare_cuda gate|tests OPTIONS` prepares a Python for the CUDA gate or for the tests.
#
# tests/gate/check.py checks first: exit code 2 and one sentence where something is wrong. Missing
# packages go to .venv-cuda/site, whole or not at all; the Python's own packages stay as they are.
# Sets `python`, PYTHONPATH and SPECFORGE_SRC.
specforge_commit=7a81ce53a0381c6438fd19d6e247d34c68497012

refuse() {
  echo "$0: $*" >&2
  exit 2
}

prepare_cuda() {
  local plan lines state wheels src
  python=${PYTHON:-python3}
  command -v "$python" >/dev/null || refuse "PYTHON=$python: no such program"

  # Lines of tests/gate/check.py: state, folder of wheels, SpecForge's checkout, requirements.
  plan=$("$python" -m tests.gate.check "$@") || exit $?
  mapfile -t lines <<<"$plan"
  state=${lines[0]} wheels=${lines[1]:-} src=${lines[2]:-}

  if [ "$state" = install ]; then
    install_site "$wheels" "${lines[@]:3}"
  fi
  if [ "$state" != ready ]; then
    export PYTHONPATH=$PWD/.venv-cuda/site${PYTHONPATH:+:$PYTHONPATH}
  fi
  if [ "$src" = clone ]; then
    src=$PWD/.cache/specforge
    clone_specforge "$src"
  fi
  export SPECFORGE_SRC=$src
}

# install_site WHEELS REQUIREMENT…: into a new folder, which takes the place of .venv-cuda/site.
install_site() {
  local wheels=$1 fresh options
  shift
  options=(--retries 1 --quiet --disable-pip-version-check --no-deps --require-hashes)
  [ -z "$wheels" ] || options+=(--no-index --find-links "$wheels")

  mkdir -p .venv-cuda
  fresh=$(mktemp -d .venv-cuda/new.XXXXXX)
  trap 'rm -rf "$fresh"' EXIT
  printf '%s\n' "$@" >"$fresh.txt"
  timeout 120 "$python" -m pip install "${options[@]}" --target "$fresh" \
    --requirement "$fresh.txt" >"$fresh.log" 2>&1 || {
    tail -n 1 "$fresh.log" >&2
    rm -f "$fresh.txt" "$fresh.log"
    refuse "${1%% *} and what else is missing could not be installed; name their wheels by --wheels"
  }

  rm -rf "$fresh.txt" "$fresh.log" .venv-cuda/site
  mv -T "$fresh" .venv-cuda/site
  trap - EXIT
}

# clone_specforge FOLDER: at the pinned commit, unless it is there.
clone_specforge() {
  local src=$1
  if [ ! -d "$src" ]; then
    rm -rf "$src.new"
    timeout 120 git clone --quiet https://github.com/sgl-project/SpecForge "$src.new" &&
      git -C "$src.new" checkout --quiet "$specforge_commit" &&
      mv -T "$src.new" "$src" ||
      refuse "SpecForge could not be cloned; name a checkout by --src"
  fi
  [ "$(git -C "$src" rev-parse HEAD 2>/dev/null)" = "$specforge_commit" ] ||
    refuse "$src is not SpecForge's pull request 600; remove it, or name a checkout by --src"
}
