#!/usr/bin/env bash
# Runs the tests of `make test`; arguments choose some of them and are passed to pytest.
# Without arguments (or with `tests`) all run, in PROCESSES processes (2 by default). A process that has finished
# its share takes over tests of the other, so the load is balanced without a list of durations.
set -uo pipefail
cd "$(dirname "$0")/.."
left_out="not slurm and not browser and not server and not faults and not long"
if [ $# -gt 0 ] && [ "$*" != tests ]; then
    exec .venv/bin/python -m pytest -m "$left_out" "$@"
fi
exec .venv/bin/python -m pytest -m "$left_out" --numprocesses "${PROCESSES:-2}" --dist worksteal tests
