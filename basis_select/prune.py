"""Remove the bases that matter least until the budget is met."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from .bits import ROUNDING, prune_to_bytes
from .data.tasks import Task
from .linalg.scores import SCORES, ScoreName
from .options import Count, Fraction, Positive, checked
from .selection import Budget, Rule, select
from .statistics.derivatives import derivatives as differentiate
from .target import Dtype, target


@checked
def prune(
    model: PreTrainedModel,
    task: Task | None = None,
    derivatives: list[tuple[torch.Tensor, torch.Tensor]] | None = None,
    reserve: int = 0,
    dtype: Dtype = "bfloat16",
    seed: int = 0,
    *,
    keep: Annotated[
        Fraction | None, Field(description="Fraction that stays of the parameters of the layers written as bases.")
    ] = None,
    size: Annotated[
        str | None,
        Field(
            description="Size of the whole model: 4x smaller, 90M parameters or 120MB.", examples=["4x", "90M", "120MB"]
        ),
    ] = None,
    max_drop: Annotated[
        Positive | None,
        Field(description="The smallest model whose loss rises by at most so many nats per token, before healing."),
    ] = None,
    mass: Annotated[
        Fraction | None,
        Field(description="Basel's share of each layer's sum of singular values; the size is what comes out."),
    ] = None,
    latency: Annotated[
        str | None,
        Field(
            description="Speed of the whole model, by the times in `costs`: 2x decode, 20ms decode, 1.5x prefill 128. "
            "Layers that are no faster factored stay dense.",
            examples=["2x decode", "20ms decode", "1.5x prefill 128"],
        ),
    ] = None,
    costs: Annotated[
        str | None, Field(description="The file of times that `basis-select profile` measured on the device.")
    ] = None,
    budget: Annotated[
        Budget,
        Field(
            description="How layers share the size: global keeps the highest scores per parameter, uniform the same "
            "fraction of every layer, mass (Basel) the same share of every layer's sum of scores."
        ),
    ] = "global",
    score: Annotated[
        ScoreName,
        Field(
            description="Which bases stay: energy (error in the metric), magnitude (Basel), taylor (gradient and "
            "curvature of the loss, after BSI), random."
        ),
    ] = "energy",
    multiple_of: Annotated[Count, Field(description="Ranks are multiples of this.")] = 16,
    bits: Annotated[
        Literal["auto", 16],
        Field(
            description="16: weights stay numbers of 16 bits. auto: a size such as 45MB or 6x is bytes on disk, shared "
            "over bases and their bits: every layer becomes dense or a rank, with weights of 8 to 2 bits."
        ),
    ] = 16,
    rounding: Annotated[
        Fraction,
        Field(
            description="With bits=auto, the share of the rounding loss that counts. A smaller share keeps more bases "
            "with fewer bits; it suits long healing, which repairs more of the rounding loss."
        ),
    ] = ROUNDING,
    keep_embedding: Annotated[
        Fraction | None,
        Field(
            description="Fraction of the embedding's parameters that stays, where it was written as bases; without it, "
            "its part of `size` is found on the validation split."
        ),
    ] = None,
) -> PreTrainedModel:
    """Keep the best bases, fold their weights into the factors, in place; returns the model.

    How much stays is said in one of five ways. `keep`: the fraction of the parameters of the layers that `decompose`
    wrote as bases. `size`: of the whole model, "4x" fewer parameters, "90M" parameters or "120MB" in `dtype`. Neither
    is ever exceeded.
    `max_drop`: the smallest model whose response NLL on the validation split of `task` rises by at most so many nats
    per token, before healing and with the embedding cut as `keep_embedding` says. `mass`: Basel's KeepRatio, the
    share of each layer's sum of scores; size is an outcome. `latency`: how fast the whole model should be on the device
    whose times `basis-select profile` wrote to the file `costs`: "2x decode", "20ms decode", "1.5x prefill 128". Bases
    are kept by score per second then, at ranks that were timed, and a layer stays dense where it would be no faster
    factored.

    `score` is one of SCORES; those that need derivatives take `derivatives` or compute them on `task`. `budget` says
    how the size is shared: "global" (highest score per parameter over all layers), "uniform" (the same
    fraction of every layer), or "mass" (Basel: the same share of each layer's sum of scores). Ranks are multiples of
    `multiple_of`, with `mass` given alone they are not rounded; a layer whose rank would reach break-even,
    in*out/(in+out), stays dense. `reserve` bases per layer are left free for `extend`. `keep_embedding` is the fraction
    of the embedding's parameters that may stay, where `decompose` wrote it as bases: not part of the targeted
    layers, but of `size`. Without it, `size` is shared between embedding and layers as `best_share` finds on the
    validation split of `task`. With `bits="auto"` a size is bytes on disk, and what every group of layers becomes,
    dense or a rank, with 8, 4, 3 or 2 bits, is chosen by the loss in the metric that it avoids per byte (bits.py). Of
    the loss by rounding the share `rounding` counts. Raises ValueError when the budget cannot be met.

        >>> model = bs.decompose(copy.deepcopy(parent), task, examples=16)
        >>> model = bs.prune(model, size="1.5x", multiple_of=4)
        >>> sizes = bs.sizes(model)
        >>> sizes["parameters_dense"] / sizes["parameters"] >= 1.5
        True

        What is asked for is checked:

        >>> bs.prune(model, keep=2)
        Traceback (most recent call last):
        ValueError: prune: keep is 2, it should be a fraction above 0 and up to 1, or null
    """
    asked = target(keep=keep, size=size, max_drop=max_drop, mass=mass, latency=latency)
    if bits == "auto":
        rule = Rule(budget, score, multiple_of, reserve, seed)
        prune_to_bytes(model, asked, rule, task, dtype, keep_embedding, rounding)
        return model
    if rounding != ROUNDING:
        raise ValueError(f"rounding={rounding} has an effect only with bits=auto: leave it out, or choose bits=auto")
    if SCORES.get(score) and SCORES[score].derivatives and derivatives is None:
        if task is None:
            raise ValueError(f"score {score!r} looks at the loss: pass a task or its derivatives")
        derivatives = differentiate(model, task, seed)
    rule = Rule(budget, score, multiple_of, reserve, seed, derivatives)
    for group, index in select(model, asked, rule, task, dtype, costs, keep_embedding):
        if index is None:
            group.to_dense(model)
        else:
            group.take(index)
            group.fold(model)
    return model
