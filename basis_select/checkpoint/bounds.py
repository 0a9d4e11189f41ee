"""What a config asks for, against what the weight files hold: before memory is taken and hours are spent."""

import math
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..system.reading import read_json
from .checks import description, stored
from .format import build, dense_on_meta

SLACK = 2**20  # numbers that a model may have beside twice those in its files: what is missing is named elsewhere


def require_bounds(folder: Path, config: PreTrainedConfig) -> None:
    """Raise ValueError, naming config.json, if the model it describes is far larger than the weights beside it.

    config: what transformers read from it. Nothing is asked of folders whose weights are not in safetensors, or are
    packed by another quantizer.
    """
    path = Path(folder) / "config.json"
    _require_numbers(path, config.to_dict())
    ours = description(folder)
    if not any(Path(folder).glob("*.safetensors")) or (ours is None and "quantization_config" in read_json(path)):
        return
    places = stored(folder)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if layers > len(places):
        raise ValueError(f"{path} asks for {layers} layers (num_hidden_layers), there are {len(places)} tensors")
    held = sum(math.prod(place.shape) for place in places.values())
    model = dense_on_meta(config)
    if ours is not None:
        with torch.device("meta"):
            build(model, ours)
    asked = sum(p.numel() for p in model.parameters())
    if asked > 2 * held + SLACK:
        raise ValueError(f"{path} describes a model of {asked:,} parameters, the files beside it hold {held:,}")


def _require_numbers(path: Path, value: Any, name: str = "") -> None:
    """NaN is no setting, and neither are a scalar without bound or an epsilon below zero."""
    if isinstance(value, dict):
        for key, inner in value.items():
            _require_numbers(path, inner, str(key))
    elif isinstance(value, list | tuple):
        for inner in value:
            if isinstance(inner, float) and math.isnan(inner):
                raise ValueError(f"{path} gives {name} a NaN")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} gives {name} the number {value}")
    elif name.endswith(("eps", "epsilon")) and isinstance(value, int | float) and value < 0:
        raise ValueError(f"{path} gives {name} the number {value}, which is below zero")
