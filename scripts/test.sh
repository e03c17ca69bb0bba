#!/usr/bin/env bash
# Style, types and tests. Usage: bash scripts/test.sh [options of pytest]
# With coverage, which costs a quarter more time: bash scripts/test.sh --cov=nasq --cov-report=term:skip-covered
# The public data sets are used where NASQ_DATA names their directory; tests that need them skip otherwise.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" ".[dev]"
export OMP_NUM_THREADS=1 # one process per core; threads of several processes on one core slow each other down
ruff check .
python -m mypy
python -m mypy search_spaces proxies
python -m pytest -n 2 --dist worksteal -m "not long" "$@"
