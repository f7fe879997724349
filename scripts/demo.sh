#!/usr/bin/env bash
# CATS beside its baselines on a small chat model with less memory than its weights need, in an environment of its own; then an answer.
# Fetches what is missing (packages, and 93 MB of model) once; --resident holds all weights in memory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh requirements.txt

python -m evaluation.benchmarks.demo "$@"
