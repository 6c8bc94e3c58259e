#!/usr/bin/env bash
# Installs this project (editable) and the packages of constraints.txt into .venv. Fast if nothing has changed.
# PYTHON  interpreter for a new .venv; default: the first of python3, python3.14 ... python3.11 that is new enough
# EXTRAS  extras of pyproject.toml to install, e.g. EXTRAS=cluster,aws; default: dev
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${EXTRAS:-dev}

say() { echo "venv: $*" >&2; }

works() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

interpreter() {
    local name
    for name in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if works "$name"; then echo "$name" && return; fi
    done
    say "no Python >= 3.11 among: ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11};" \
        "install one, or give its path: make venv PYTHON=/path/to/python3"
    return 1
}

create() {
    local python
    python=$(interpreter)
    rm -rf .venv
    "$python" -m venv .venv && return
    say "$python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"
    rm -rf .venv
    return 1
}

# pip reads the site's configuration, for example of a private index; uv does not. So pip may succeed where uv fails.
# Both use the system's certificates, which the site may have extended.
export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}
put() {
    if [ -n "$uv" ]; then
        "$uv" pip install --quiet --python .venv/bin/python --constraint constraints.txt "$@" && return
        say "uv failed to install; trying pip, which is slower"
        uv=
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@"
}

fill() {
    touch .venv/unfinished
    uv=.venv/bin/uv
    if ! "$uv" --version >/dev/null 2>&1; then
        .venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv || {
            say "pip cannot install uv; using pip, which is slower"
            uv=
        }
    fi
    say "installing (about 7 GB on disk)"
    put setuptools wheel
    put --no-build-isolation --editable ".[$extras]"
    rm .venv/unfinished
}

exec 9<constraints.txt && { flock 9 2>/dev/null || true; } # only one make at a time
key="$PWD $(cat constraints.txt pyproject.toml | sha256sum) $extras"
made=$(cat .venv/key 2>/dev/null || true)
if [ "$made" = "$key" ] && works .venv/bin/python; then exit; fi

if [ ! -w "${HOME:-/nowhere}" ]; then export UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1; fi
case $made in
    "" | "$PWD "*) ;;
    *) touch .venv/unfinished ;; # made in another folder, whose path is in its scripts
esac
if [ -e .venv/unfinished ] || ! works .venv/bin/python; then create; fi
rm -f .venv/key
fill
echo "$key" >.venv/key
say "ready: .venv/bin/adaptnet --help"
