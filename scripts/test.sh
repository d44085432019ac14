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
echo "== mypy"
mypy
echo "== import-linter"
lint-imports
echo "== pytest"
# Two workers; loadgroup keeps those tests together on one that share a Slurm of this machine, or a run.
OMP_NUM_THREADS=1 pytest -n 2 --dist loadgroup "$@"
