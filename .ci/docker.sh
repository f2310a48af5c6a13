#!/bin/sh
# Make the Docker engine ready for tests: install docker.io, iptables and debootstrap where they are missing, start a
# daemon where none runs, build the sandbox image where it is missing. Safe to run again. PYTHON names the interpreter
# that has curation_env installed (default: .venv/bin/python).
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
PATH="$PATH:/usr/sbin:/sbin"

answers() { "$python" -c 'from curation_env.sandbox.image import connect; connect().close()' 2>/dev/null; }

if [ "$(id -u)" = 0 ]; then run=""; else run="sudo -n"; fi

if ! answers; then
  missing=""
  command -v dockerd >/dev/null || missing="$missing docker.io"
  command -v iptables >/dev/null || missing="$missing iptables"
  # shellcheck disable=SC2086
  [ -z "$missing" ] || sh .ci/packages.sh $missing
  if [ -n "$run" ] && ! $run true 2>/dev/null; then
    echo "no Docker daemon answers; starting one needs root or sudo (or put this user into the group docker)" >&2
    exit 1
  fi
  log=$(mktemp "${TMPDIR:-/tmp}/dockerd-XXXXXX.log")
  start() { # more arguments; sandboxes have no network, so the daemon needs no bridge; it outlives this script
    answers && return 0
    echo "starting dockerd $*"
    $run sh -c "setsid nohup dockerd --bridge=none --iptables=false --ip6tables=false $* >>'$log' 2>&1 </dev/null &"
    for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
      sleep 1
      if answers; then return 0; fi
    done
    return 1
  }
  # The default driver is the fast one; vfs works on any file system, by copying.
  start || start --storage-driver=vfs || { echo "dockerd did not start:" >&2; tail -n 20 "$log" >&2; exit 1; }
fi

problem=$("$python" -c 'from curation_env.sandbox.docker import docker_problem; print(docker_problem())')
if [ -n "$problem" ]; then
  echo "$problem"
  command -v debootstrap >/dev/null || sh .ci/packages.sh debootstrap
  $run "$python" -c 'from curation_env.sandbox.image import build_image; build_image()'
fi
echo "docker: ready"
