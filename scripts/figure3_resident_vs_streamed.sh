#!/usr/bin/env bash
# Figure 3 of the paper: speed-up in memory and streamed. Flags: python -m evaluation.reproduce --help; docs/reproduce.md
set -euo pipefail && cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt
python -m evaluation.reproduce figure3 "$@"
