#!/usr/bin/env bash
# Figure 2 of the paper: where the time of a token goes. Flags: python -m evaluation.reproduce --help; docs/reproduce.md
set -euo pipefail && cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt
python -m evaluation.reproduce figure2 "$@"
