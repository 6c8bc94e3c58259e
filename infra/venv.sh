#!/usr/bin/env bash
# Makes .venv hold the packages of constraints.txt and this project, editable. Quick when nothing changed.
# PYTHON names the interpreter for a new .venv; without it the first of python3, python3.14 … 3.11 that is new enough.
# EXTRAS names the extras of pyproject.toml that are installed with it, EXTRAS=cluster,aws say; without it those of dev.
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
        "install one, or name it: make venv PYTHON=/path/to/python3"
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

# pip reads a site's own settings (a private index, say), uv does not: what uv cannot fetch, pip may. The system's
# certificates, which a site may have added to, serve both.
export UV_SYSTEM_CERTS=${UV_SYSTEM_CERTS:-true}
put() {
    if [ -n "$uv" ]; then
        "$uv" pip install --quiet --python .venv/bin/python --constraint constraints.txt "$@" && return
        say "uv could not install; going on with pip, which takes longer"
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
            say "pip cannot fetch uv; going on with pip, which takes longer"
            uv=
        }
    fi
    say "installing (about 7 GB on disk)"
    put setuptools wheel
    put --no-build-isolation --editable ".[$extras]"
    rm .venv/unfinished
}

exec 9<constraints.txt && { flock 9 2>/dev/null || true; } # two makes at once take turns
key="$PWD $(cat constraints.txt pyproject.toml | sha256sum) $extras"
made=$(cat .venv/key 2>/dev/null || true)
if [ "$made" = "$key" ] && works .venv/bin/python; then exit; fi

if [ ! -w "${HOME:-/nowhere}" ]; then export UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1; fi
case $made in
    "" | "$PWD "*) ;;
    *) touch .venv/unfinished ;; # it was made in another folder, whose path stands in its scripts
esac
if [ -e .venv/unfinished ] || ! works .venv/bin/python; then create; fi
rm -f .venv/key
fill
echo "$key" >.venv/key
say "ready: .venv/bin/adaptnet --help"
