#!/usr/bin/env bash
# Table 4 of the paper: bytes of weights per token, for any model:
#   bash scripts/table4_bytes_per_token.sh MODEL DRAFT_ADAPTER SHALLOW_ADAPTER... [-- FLAGS OF python -m evaluation.tables]
# Without arguments: the embedded model, its flash imitated at 50 MB/s, so that streaming and not arithmetic sets the pace, as at 7B.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt

paths=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    paths+=("$1")
    shift
done
if [ $# -gt 0 ]; then shift; fi
flags=("$@")
if [ ${#paths[@]} -eq 0 ]; then
    paths=(data/tiny data/tiny/adapters/draft_exit2 data/tiny/adapters/shallow_exit6 data/tiny/adapters/shallow_exit8)
    flags=(--flash-bandwidth 50MB/s ${flags[@]+"${flags[@]}"})
elif [ ${#paths[@]} -lt 3 ]; then
    printf 'error: give a model, a draft adapter and one or more shallow adapters, or nothing for the embedded model.\n' >&2
    exit 2
fi

python -m evaluation.tables bytes-per-token --model-path "${paths[0]}" --draft-adapter-path "${paths[1]}" \
    --shallow-adapter-paths "${paths[@]:2}" --output "evaluation/results/table4_bytes_per_token.json" ${flags[@]+"${flags[@]}"}
