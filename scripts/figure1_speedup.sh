#!/usr/bin/env bash
# Figure 1 of the paper: speed-up of every method. Flags: python -m evaluation.reproduce --help; docs/reproduce.md
set -euo pipefail && cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt
python -m evaluation.reproduce figure1 "$@"
