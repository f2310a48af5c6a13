#!/usr/bin/env bash
# Makes the Docker engine ready for tests: installs docker.io, iptables and debootstrap where they are missing, starts a
# daemon where none runs, and builds the sandbox image where it is missing. Safe to run again. PYTHON names the interpreter
# that has curation_env installed (default: .venv/bin/python).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; elif command -v sudo >/dev/null && sudo -n true 2>/dev/null; then sudo -n "$@"; else return 99; fi
}
export PATH="$PATH:/usr/sbin:/sbin"

missing=()
command -v dockerd >/dev/null || command -v docker >/dev/null || missing+=(docker.io)
command -v iptables >/dev/null || missing+=(iptables)
command -v debootstrap >/dev/null || missing+=(debootstrap)
answers() { curl -fsS --max-time 5 --unix-socket /var/run/docker.sock http://localhost/_ping >/dev/null 2>&1; }
if ! answers && ! command -v dockerd >/dev/null && [[ ! " ${missing[*]:-} " == *" docker.io "* ]]; then
    missing+=(docker.io)
fi
if [ ${#missing[@]} -gt 0 ]; then
    echo "installing ${missing[*]}"
    as_root sh -c "apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends ${missing[*]}" \
        >/dev/null || { echo "the tests need these Debian packages, as root or by sudo: apt-get install ${missing[*]}" >&2; exit 1; }
fi

if ! answers; then
    echo "starting dockerd"
    log=$(mktemp /tmp/curation-dockerd-XXXXXX.log)
    start() { # extra arguments; the daemon outlives this script
        as_root sh -c "setsid nohup dockerd --bridge=none --iptables=false --ip6tables=false $* >>'$log' 2>&1 </dev/null &"
        for _ in $(seq 150); do
            answers && return 0
            sleep 0.2
        done
        return 1
    }
    as_root true || { echo "no Docker daemon runs, and starting one needs root or sudo" >&2; exit 1; }
    # overlay2 is the default and the fast one; vfs works on any file system, copying whole layers
    start || start --storage-driver=vfs || { echo "dockerd did not start; its log:" >&2; tail -n 20 "$log" >&2; exit 1; }
fi

as_root_python() { if [ "$(id -u)" = 0 ]; then "$python" "$@"; else sudo -n "$python" "$@"; fi; }
"$python" - <<'PY' || as_root_python -c "from curation_env.sandbox.image import build_image; print('built', build_image())"
import sys
from curation_env.sandbox.docker import docker_problem

problem = docker_problem()
print("docker:", problem or "ready")
sys.exit(1 if problem else 0)
PY
