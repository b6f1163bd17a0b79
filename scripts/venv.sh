# Sourced: `make_venv FOLDER EXTRA [BARE ...]` makes a virtual environment.
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
