#!/bin/sh
# Make a virtual environment with pip in it. Debian's Python lacks ensurepip until python3-venv is installed, and a venv
# that failed for it leaves its python behind: so pip is what tells whether it is whole.
# Usage: PYTHON=python3 .ci/venv.sh FOLDER
set -eu
python=${PYTHON:-python3}
make_venv() { "$python" -m venv --clear "$1" >/dev/null 2>&1 && test -x "$1/bin/pip"; }
if ! make_venv "$1"; then
  version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
  # Another Python than Debian's own has its package under its version's name.
  sh "$(dirname "$0")/packages.sh" python3-venv || exit 1
  make_venv "$1" || sh "$(dirname "$0")/packages.sh" "$version-venv" || true
  make_venv "$1" || { echo "$python -m venv $1 failed: make PYTHON=... names another Python" >&2; exit 1; }
fi
