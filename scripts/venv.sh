# Sourced: virtual environments for the scripts here, and this checkout's wheel in one of them.
#
# `make_venv FOLDER EXTRA [BARE ...]` makes a virtual environment.
# It has this checkout with one extra, and the packages BARE without their dependencies, and is
# made again only when pyproject.toml changes. TORCH names the torch requirement (default: the
# tested one), CONSTRAINTS a file of pip's constraints (default: none).
make_venv() {
  local folder=$1 extra=$2 stamp
  shift 2
  local install=("$folder/bin/pip" install --quiet --disable-pip-version-check)
  local sources=(pyproject.toml scripts/venv.sh)
  if [ -n "${CONSTRAINTS:-}" ]; then
    install+=(--constraint "$CONSTRAINTS")
    sources+=("$CONSTRAINTS")
  fi

  # The stamp is written last: an installation that failed begins anew.
  stamp="$(cat "${sources[@]}" | cksum) ${TORCH:=torch==2.13.0} $extra $*"
  if [ "$(cat "$folder/.stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "installing into $folder" >&2
    "${PYTHON:-python3}" -m venv --clear "$folder"
    "${install[@]}" "$TORCH"
    "${install[@]}" --editable ".[$extra]" "$TORCH"
    if [ $# -gt 0 ]; then
      "${install[@]}" --no-deps "$@"
    fi
    printf '%s' "$stamp" >"$folder/.stamp"
  fi
}

# `test_wheel FOLDER [ARGUMENT ...]` builds this checkout's wheel, installs it into that environment,
# and runs pytest in a copy of the checkout whose eagle3fn/ is a link to what was installed: tests,
# and the processes that they start, find the wheel's files alone. Without arguments all tests run,
# in two processes. CHECKOUT names the checkout to the tests. The copy keeps the caches of pytest
# and Hypothesis.
test_wheel() {
  local folder copy python
  folder=$(cd "$1" && pwd)
  copy=$folder/checkout
  python=$folder/bin/python
  shift
  local folders=(tests bench scripts docs examples .ci .github)
  local files=(*.md *.toml *.cff LICENSE NOTICE .gitignore .pre-commit-config.yaml)

  # The wheel is built in the copy: a build folder of earlier builds would add what is gone.
  mkdir -p "$copy"
  (cd "$copy" && rm -rf eagle3fn build ./*.egg-info "${folders[@]}" "${files[@]}")
  tar --exclude=__pycache__ -cf - eagle3fn "${folders[@]}" "${files[@]}" | tar -xf - -C "$copy"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index \
    --no-build-isolation --force-reinstall "$copy"

  export CHECKOUT=$PWD
  cd "$copy"
  rm -rf eagle3fn build ./*.egg-info
  ln -s "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/eagle3fn" .
  [ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile
  exec "$python" -m pytest "$@"
}
