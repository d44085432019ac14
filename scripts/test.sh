#!/usr/bin/env bash
# Every check of the project: lint, format, types, folder contracts, tests. All of it runs on CPU.
#   bash scripts/test.sh [more arguments of pytest]
# Tests that need a GPU skip here; on a machine with one:  pytest -m gpu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
# shellcheck source=/dev/null
source .venv/bin/activate

echo "== ruff"
ruff check .
ruff format --check .
echo "== import-linter"
lint-imports
echo "== pytest, and mypy beside it"
types=$(mktemp)
trap 'rm -f "$types"' EXIT
mypy >"$types" 2>&1 &
# Two workers; loadgroup keeps on one of them the tests that share a run or a Slurm of this machine (tests/conftest.py).
OMP_NUM_THREADS=1 pytest -n 2 --dist loadgroup "$@" && tests=0 || tests=$?
wait $! && status=$tests || status=1
echo "== mypy"
cat "$types"
exit "$status"
