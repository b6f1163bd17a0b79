# Sourced: `make_venv FOLDER EXTRA [BARE ...]` makes a virtual environment with this checkout and one extra, and BARE
# packages without their dependencies, once per pyproject.toml.
# TORCH names the torch requirement (default: the tested one).
make_venv() {
  local folder=$1 extra=$2 stamp
  shift 2
  stamp="$(cat pyproject.toml scripts/venv.sh | cksum) ${TORCH:=torch==2.13.0} $extra $*"
  if [ "$(cat "$folder/.stamp" 2>/dev/null)" != "$stamp" ]; then
    echo "installing into $folder" >&2
    "${PYTHON:-python3}" -m venv --clear "$folder"
    "$folder/bin/pip" install --quiet --disable-pip-version-check "$TORCH"
    "$folder/bin/pip" install --quiet --disable-pip-version-check --editable ".[$extra]" "$TORCH"
    if [ $# -gt 0 ]; then
      "$folder/bin/pip" install --quiet --disable-pip-version-check --no-deps "$@"
    fi
    printf '%s' "$stamp" >"$folder/.stamp"
  fi
}
