#!/usr/bin/env bash
# All tests of `make test`. Without arguments the families' run beside the others, one on each of two cores.
set -uo pipefail
cd "$(dirname "$0")/.."
left_out="not slurm and not browser and not server and not faults"
run() { .venv/bin/python -m pytest -m "$left_out" "$@"; }
if [ $# -gt 0 ] && [ "$*" != tests ]; then
    run "$@"
    exit
fi
families=$(mktemp)
run tests/families tests/test_family_contract.py >"$families" 2>&1 &
beside=$!
trap 'rm -f "$families"; kill $beside 2>/dev/null' EXIT
run tests --ignore tests/families --ignore tests/test_family_contract.py
code=$?
wait $beside || code=1
cat "$families"
exit $code
