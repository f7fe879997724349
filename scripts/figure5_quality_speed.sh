#!/usr/bin/env bash
# Figure 5 of the paper: quality against speed. Flags: python -m evaluation.reproduce --help; docs/reproduce.md
set -euo pipefail && cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt
python -m evaluation.reproduce figure5 "$@"
