# Sourced by the other scripts: `make_venv FOLDER REQUIREMENT` makes a virtual environment that holds this checkout,
# and brings it up to date when what it was made from has changed.

find_python() {
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
        [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "transload needs Python 3.11 or newer with pip; found none. Install one, or name it: PYTHON=/path/to/python3 $0" >&2
    return 1
}

make_venv() {
    folder=$1 requirement=$2
    wanted=$(cat pyproject.toml constraints.txt scripts/venv.sh | cksum)
    if [ "$(cat "$folder/made-from" 2>/dev/null || true)" = "$wanted" ]; then
        return
    fi
    python=$(find_python) || return 1
    echo "setting up $folder with $("$python" --version) (the first time this downloads torch)" >&2
    [ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "torch==2.13.0"
    "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$requirement"
    echo "$wanted" >"$folder/made-from"
}
