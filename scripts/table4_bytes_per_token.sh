#!/usr/bin/env bash
# Table 4 of the paper: bytes of weights per token. Flags: python -m evaluation.reproduce --help; docs/reproduce.md
set -euo pipefail && cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt
python -m evaluation.reproduce table4 "$@"
