#!/usr/bin/env bash
# What one GPU does with every model: agreement with the CPU, cells a second, memory, training, memory that runs out.
#
#     bash benchmarks/gpu.sh [FOLDER] [MINUTES]
#
# Installs nothing: cellprior and a PyTorch with CUDA are needed. Writes FOLDER/gpu.md (default: gpu), row by row, and
# stops after MINUTES (default: 7.5). Cells are made up and weights are random, so that no file is needed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" CELLPRIOR_OFFLINE=1
exec python -W ignore benchmarks/gpu.py --out "${1:-gpu}" --minutes "${2:-7.5}"
