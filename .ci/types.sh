#!/bin/sh
# Type-check the package as it is installed: only there are envs/, agents/ and wrappers/ under their real names.
# Usage: .ci/types.sh PYTHON
set -eu
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
root=$(cd "$(dirname "$0")/.." && pwd)
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
# A copy, because building leaves files beside the sources.
git -C "$root" ls-files -z --cached --others --exclude-standard -- setup.cfg pyproject.toml README.md LICENSE \
  curation_env envs agents wrappers conf | (cd "$root" && xargs -0 sh -c 'for f; do [ -e "$f" ] && printf "%s\0" "$f"; done' sh) \
  | tar -C "$root" --null -T - -cf - | tar -C "$place" -xf -
"$python" -m pip install -q --no-deps --no-build-isolation --no-compile --target "$place/site" "$place" 2>&1 | grep -v "WARNING: Target" || true
cd "$place/site"
"$python" -m mypy --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache/installed" -p curation_env
