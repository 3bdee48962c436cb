#!/bin/sh
# Make a virtual environment and install the project into it: setup.sh FOLDER ".[extra]"
set -eu
venv=$1
target=$2

if command -v uv >/dev/null 2>&1; then
    echo "Setting up with uv (once) …"
    if ! "$venv/bin/python" -c '' 2>/dev/null; then
        rm -rf "$venv" # uv refuses a folder that an interrupted set-up left
        uv venv --quiet --python ">=3.11,<3.14" "$venv"
    fi
    exec uv pip install --quiet --python "$venv/bin/python" --constraint constraints.txt --editable "$target"
fi

if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=
    without_venv=
    # python3 first: what a user or a CI job activated is what it wants.
    for candidate in python3 python3.13 python3.12 python3.11; do
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            python=$candidate
            break
        fi
        without_venv=${without_venv:-$candidate}
    done
    if [ -z "$python" ] && [ -n "$without_venv" ]; then
        echo "error: $without_venv cannot make virtual environments." >&2
        echo "Run: apt install $without_venv-venv" >&2
        exit 2
    fi
    if [ -z "$python" ]; then
        echo "error: Python 3.11, 3.12 or 3.13 is needed, and none was found." >&2
        echo "Run: brew install python@3.13   # macOS; on Debian: apt install python3 python3-venv" >&2
        exit 2
    fi
    rm -rf "$venv"
    "$python" -m venv "$venv"
fi
echo "Setting up with pip (once; about a minute) …"
exec "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --constraint constraints.txt --editable "$target"
