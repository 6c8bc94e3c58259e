#!/usr/bin/env bash
# Checks lint, formatting, types and import order of the whole tree. Runs every check even after one has failed.
set -uo pipefail
cd "$(dirname "$0")/.."
infra/venv.sh || exit 1

failed=
check() {
    echo "+ $*"
    .venv/bin/python -m "$@" || failed="$failed $1"
}

check ruff check .
check ruff format --check .
check mypy
check pytest -q --durations=0 tests/test_import_order.py
if [ -n "$failed" ]; then
    echo "check: failed:$failed" >&2
    exit 1
fi
echo "check: all passed"
