"""A dense model rounded by Intel's AutoRound (arXiv 2309.05516, `pip install auto-round`), as our layers hold it.

AutoRound learns, block by block, which way each weight is rounded and how wide the range of its group is, from the
outputs that the whole block had. Its numbers, 32 with one scale, are the same as ours, so that bytes and everything
later are alike.
"""

import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader

from basis_select.checkpoint.targets import targets
from basis_select.layers.rounded import RoundedLinear
from basis_select.layers.rounding import GROUP, RANGE

ROWS, TOKENS, BATCH = 128, 128, 8  # of examples of the task, one after the other


def auto_rounded(model, tokenizer, task, bits, iterations):
    """The linear layers of a dense `model` as RoundedLinear of 4 or 3 bits, in place; `iterations`: of each block."""
    ids = torch.tensor([i for example in task.train for i in example.input_ids])
    ids = ids[: min(ROWS, len(ids) // TOKENS) * TOKENS].view(-1, TOKENS)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    options = {"bits": bits, "group_size": GROUP, "sym": True, "scale_dtype": "bf16"}
    data = {"dataset": DataLoader(rows, BATCH), "nsamples": len(rows), "seqlen": TOKENS, "batch_size": BATCH}
    where = {"device_map": str(model.device), "low_cpu_mem_usage": False, "enable_torch_compile": False}
    names = list(targets(model))
    made = AutoRound(model, tokenizer, iters=iterations, **options, **data, **where).quantize()[0].float()
    for name in names:
        linear = made.get_submodule(name)
        scale = linear.scale.view(linear.out_features, -1).bfloat16().float()
        each = scale.repeat_interleave(GROUP, 1)[:, : linear.in_features]
        whole = (linear.weight / each).round()
        lowest, highest = RANGE[bits]
        off = (whole * each - linear.weight).abs().max() / each.abs().max()
        if off > 0.1 or whole.min() < lowest or whole.max() > highest:
            raise ValueError(f"{name}: what AutoRound has made are no whole numbers of {bits} bits times its scales")
        made.set_submodule(name, RoundedLinear.of(linear, whole.to(torch.int8), scale, bits))
    return made
