#!/usr/bin/env bash
# CATS on the embedded model, in an environment of its own: plain decoding, Kangaroo, CATS chain and CATS tree, then the text they wrote.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt

python -m scripts.demo "$@"
