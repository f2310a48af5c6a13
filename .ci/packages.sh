#!/bin/sh
# Install Debian packages as root or by sudo; name them when neither is possible.
set -eu
missing=""
for package in "$@"; do
  dpkg -s "$package" >/dev/null 2>&1 || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if [ "$(id -u)" = 0 ]; then run=""
elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then run="sudo"
else
  echo "needed:$missing. Install them as root: apt-get install --no-install-recommends$missing" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
$run apt-get update -qq
# shellcheck disable=SC2086
$run apt-get install -y -qq --no-install-recommends $missing >/dev/null
