"""Verify that a checkpoint loads as it was saved."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from .checks import SIDECAR
from .models import load


def probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits (2, 16, vocabulary) on fixed token ids: what `verify` compares."""
    vocabulary = model.config.get_text_config().vocab_size  # an export has no module of its embedding
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(input_ids=ids.to(model.device)).logits.cpu()


def verify(folder: str | Path, model: PreTrainedModel | None = None) -> dict[str, bool | float]:
    """Reload `folder` in a fresh process and compare logits with `model` (default: loaded here).

    Returns `{"bit_equal": bool, "max_difference": float, "hashes_match": bool}`; the last is false for a folder without
    recorded hashes, whose files nothing can be compared with. Raises ValueError if the checkpoint is damaged or gives
    non-finite logits. A model in memory must have the dtype that was saved for equality to be meant.

        >>> bs.verify("parent")["bit_equal"]
        True
    """
    if model is None:
        model = load(folder)[0]
    with tempfile.TemporaryDirectory() as scratch:
        out = os.path.join(scratch, "logits.safetensors")
        code = "import sys; from basis_select.checkpoint.verify import _dump; _dump(*sys.argv[1:])"
        done = subprocess.run([sys.executable, "-c", code, str(folder), out], capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"{folder} does not load in a fresh process: {done.stderr.strip().splitlines()[-1]}")
        there = load_file(out)["logits"]
    here = probe_logits(model)
    if not torch.isfinite(there).all():
        raise ValueError(f"{folder} gives non-finite logits")
    return {
        "bit_equal": torch.equal(here, there),
        "max_difference": (here.double() - there.double()).abs().max().item(),
        "hashes_match": (Path(folder) / SIDECAR).exists(),  # both loads checked them
    }


def _dump(folder: str, out: str) -> None:
    save_file({"logits": probe_logits(load(folder)[0])}, out)
