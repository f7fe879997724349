#!/usr/bin/env bash
# Every table and figure; --quick: a trial of all of it in minutes. Flags: python -m evaluation.reproduce --help; docs/reproduce.md
set -euo pipefail && cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt
python -m evaluation.reproduce all "$@"
