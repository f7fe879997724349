#!/usr/bin/env bash
# Table 4 of the paper: bytes of weights per token, for any model:
#   bash scripts/table4_bytes_per_token.sh MODEL DRAFT_ADAPTER SHALLOW_ADAPTER... [-- FLAGS OF python -m evaluation.tables]
# Without arguments: the default model and its adapters, its flash imitated at 100 MB/s, so that streaming and not arithmetic sets the pace, as at 7B.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt
source scripts/paper_table.sh bytes-per-token evaluation/results/table4_bytes_per_token.json "$@"
