#!/usr/bin/env bash
# Table 2 of the paper: larger models. Needs --model-path and adapters of one of them; without, the paper's rows. Flags: python -m evaluation.reproduce --help; docs/reproduce.md
set -euo pipefail && cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt
python -m evaluation.reproduce table2 "$@"
