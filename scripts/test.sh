#!/usr/bin/env bash
# Style, types and tests, in an environment of its own. Arguments go to pytest: `bash scripts/test.sh -m 'not slow' -k cache`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements-dev.txt

ruff check --quiet .
mypy --no-error-summary
# One process a core, each with one thread; whoever has nothing left takes tests of another.
OMP_NUM_THREADS=1 python -m pytest -q -n auto --dist worksteal "$@"
