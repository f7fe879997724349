#!/usr/bin/env bash
# Table 3 of the paper: speed by memory budget. Flags: python -m evaluation.reproduce --help; docs/reproduce.md
set -euo pipefail && cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt
python -m evaluation.reproduce table3 "$@"
