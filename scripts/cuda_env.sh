# Sourced: `prepare_cuda gate|tests OPTIONS` makes the Python at hand ready for the CUDA gate or the tests on a card.
# It checks first (tests/gate/check.py: exit code 2 and one sentence where something is wrong), and sets `python`,
# PYTHONPATH and SPECFORGE_SRC. What is missing goes to .venv-cuda/site, whole or not at all; the Python's own packages
# stay as they are.
specforge_commit=7a81ce53a0381c6438fd19d6e247d34c68497012

refuse() {
  echo "$0: $*" >&2
  exit 2
}

prepare_cuda() {
  local plan lines wheels src fresh source=()
  python=${PYTHON:-python3}
  command -v "$python" >/dev/null || refuse "PYTHON=$python: no such program"
  plan=$("$python" -m tests.gate.check "$@") || exit $?
  mapfile -t lines <<<"$plan"
  wheels=${lines[1]:-} src=${lines[2]:-}

  if [ "${lines[0]}" = install ]; then
    [ -z "$wheels" ] || source=(--no-index --find-links "$wheels")
    mkdir -p .venv-cuda
    fresh=$(mktemp -d .venv-cuda/new.XXXXXX)
    trap 'rm -rf "$fresh"' EXIT
    printf '%s\n' "${lines[@]:3}" >"$fresh.txt"
    timeout 120 "$python" -m pip install --retries 1 --quiet --disable-pip-version-check --no-deps --require-hashes --target "$fresh" \
      ${source[@]+"${source[@]}"} --requirement "$fresh.txt" >"$fresh.log" 2>&1 || {
      tail -n 1 "$fresh.log" >&2
      rm -f "$fresh.txt" "$fresh.log"
      refuse "${lines[3]%% *} and what else is missing could not be installed; name their wheels by --wheels"
    }
    rm -rf "$fresh.txt" "$fresh.log" .venv-cuda/site
    mv -T "$fresh" .venv-cuda/site
    trap - EXIT
  fi
  if [ "${lines[0]}" != ready ]; then
    export PYTHONPATH=$PWD/.venv-cuda/site${PYTHONPATH:+:$PYTHONPATH}
  fi

  if [ "$src" = clone ]; then
    src=$PWD/.cache/specforge
    if [ ! -d "$src" ]; then
      rm -rf "$src.new"
      timeout 120 git clone --quiet https://github.com/sgl-project/SpecForge "$src.new" &&
        git -C "$src.new" checkout --quiet "$specforge_commit" && mv -T "$src.new" "$src" ||
        refuse "SpecForge could not be cloned; name a checkout by --src"
    fi
    [ "$(git -C "$src" rev-parse HEAD 2>/dev/null)" = "$specforge_commit" ] ||
      refuse "$src is not SpecForge's pull request 600; remove it, or name a checkout by --src"
  fi
  export SPECFORGE_SRC=$src
}
