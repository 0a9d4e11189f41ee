"""By which number a basis is kept or pruned. Pure functions of one layer's bases.

s: (r,) their weights; g, h: (r,) gradient and Hessian diagonal of the task loss with respect to s, or None where the
score does not ask for them; generator: for the one score that draws. Each returns (r,), higher is kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch


def magnitude(
    s: torch.Tensor, g: torch.Tensor | None, h: torch.Tensor | None, generator: torch.Generator
) -> torch.Tensor:
    """Basel: the re-learned singular value."""
    return s.abs()


def energy(s: torch.Tensor, g: torch.Tensor | None, h: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """What truncation costs in the metric; comparable across layers in the kronecker metric only."""
    return s.square()


def taylor(s: torch.Tensor, g: torch.Tensor, h: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Second-order estimate of the loss increase when basis i is removed, `ds_i = -s_i`. Ours, after BSI's abstract."""
    return h * s.square() / 2 - g * s


def random(s: torch.Tensor, g: torch.Tensor | None, h: torch.Tensor | None, generator: torch.Generator) -> torch.Tensor:
    """The floor that any other score must beat."""
    return torch.rand(s.shape, generator=generator, dtype=s.dtype)


@dataclass(frozen=True)
class Score:
    of: Callable
    derivatives: bool = False  # whether it needs g and h


ScoreName = Literal["energy", "magnitude", "taylor", "random"]
SCORES: dict[ScoreName, Score] = {
    "energy": Score(energy),
    "magnitude": Score(magnitude),
    "taylor": Score(taylor, derivatives=True),
    "random": Score(random),
}
