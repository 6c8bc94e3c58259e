#!/usr/bin/env bash
# Tries the GPU paths on one machine with one GPU and torch, without a network, and prints one table.
#
# Run it in the root of a copy of this repository:
#   WHEELS=FOLDER DATA=FOLDER infra/gpu/accept.sh --minutes 8 --json accept.json
# WHEELS  folder with unpacked Python packages that the machine lacks (pip install --no-deps --target FOLDER *.whl):
#         pydantic, pydantic_core, annotated_types, typing_inspection; for the rows that decode also
#         nvidia-dali-cuda130, nvidia-nvimgcodec-cu13, nvidia-nvjpeg, astunparse, gast, makefun, optree.
#         Without them the rows say "needs DALI". Ray, MLflow and the other requirements are not needed.
# DATA    folder of JPEGs or of class folders; without it JPEGs of 500 x 375 are drawn, which takes some seconds
# PYTHON  the interpreter that has torch; default: python3
# Options: --minutes N (time in all), --json FILE, --only PART..., --list, --rehearse (on the CPU, with small sizes),
# --patience N (factor of the parts' time limits, for a machine under load).
#
# Parts, most valuable first; each runs in a process of its own with a time limit, so that a crash is a row:
#   environment, roi (decoding as the loader does it), whole (other ways to decode), nets (each family against the
#   CPU), speed (our loop against a bare one), profile (launches, idle share), waits (where the host waits), rates
#   (decoding), feed (from JPEG to trained step), broken (broken JPEGs), pixels (CPU against GPU decoder), resume
#   (killed and resumed), nccl (DDP of one rank), contexts (several GPUs only), compiled (torch.compile, CUDA graphs).
# All take 6 to 8 minutes on an H200. What does not fit is listed as left out. accept.json is complete after each row.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONPATH="$PWD${WHEELS:+:$(realpath "$WHEELS")}${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 PYTHONDONTWRITEBYTECODE=1 DATA="${DATA:+$(realpath "$DATA")}"
exec "${PYTHON:-python3}" -m infra.gpu.accept "$@"
