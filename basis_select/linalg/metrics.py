"""The inner product in which a weight is decomposed, and the decomposition itself.

With roots `R R^T = G = E[g g^T]` and `L L^T = A = E[x x^T]`, the SVD of `R^T W L = u' diag(s) v'` maps back to
`u = R^-T u'`, `v = v' L^-1`, so that `W = u diag(s) v` and dropping basis i costs exactly `s_i^2` in the metric
`||R^T (.) L||_F^2`. Any root gives the same u, s, v: two roots of one matrix differ by a rotation, which
the SVD absorbs. And only the smaller side needs one: `(W L)^T G (W L) = v'^T diag(s^2) v'`, `u diag(s) = W L v'^T`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

LEAST = 1e-10  # of the largest s: below it float64 resolves no direction, and s stays there


def shrunk(moment: torch.Tensor, samples: int) -> torch.Tensor:
    """A second moment estimated from `samples` vectors, shrunk towards the identity of its trace, in float64.

    moment: (n, n), or () for that multiple of the identity, which stays as it is. Returns
    `(1 - rho) moment + rho mean I` with the mean of the eigenvalues and the rho that has the least expected error for
    Gaussian vectors (OAS, arXiv 0907.4698). With a few large eigenvalues it is about 2 / samples. Raises ValueError on
    a non-finite moment and on one that is zero.
    """
    moment, mean = _checked(moment)
    if not moment.dim():
        return mean
    n, square = len(moment), float(torch.linalg.vector_norm(moment)) ** 2
    whole = float(mean * n) ** 2
    apart = (samples + 1 - 2 / n) * (square - whole / n)
    rho = min(1.0, ((1 - 2 / n) * square + whole) / apart) if apart > 0 else 1.0
    moment = moment * (1 - rho)
    moment.diagonal().add_(rho * mean)
    return moment


def shifted(moment: torch.Tensor, share: float) -> torch.Tensor:
    """`moment + share * mean eigenvalue * I` in float64; moment: (n, n) or its diagonal (n,). Raises as `shrunk`."""
    moment, mean = _checked(moment)
    moment = moment.clone()
    (moment.diagonal() if moment.dim() == 2 else moment).add_(share * mean)
    return moment


def _checked(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A moment in float64 and the mean of its eigenvalues."""
    if not torch.isfinite(moment).all():
        raise ValueError("the second moment holds non-finite values")
    moment = moment.double()
    mean = (moment.diagonal() if moment.dim() == 2 else moment).mean()
    if mean <= 0:
        raise ValueError("the second moment is zero: no task token reaches this layer")
    return moment, mean


@dataclass(frozen=True)
class Metric:
    """What a metric makes of A (`inputs`) and of G (`outputs`), functions of a moment and of how many vectors it is the
    mean; None where it uses the identity instead.

    With `squares`, `inputs` is asked of the squared gradients of the weights, (n,), in place of A.
    """

    inputs: Callable | None = None
    outputs: Callable | None = None
    squares: bool = False


MetricName = Literal["plain", "fisher", "whitened", "kronecker"]
METRICS: dict[MetricName, Metric] = {
    "plain": Metric(),  # Basel: weight error
    # FWSVD: weight error, weighted by the Fisher information of the weights that read an input
    "fisher": Metric(inputs=lambda squares, samples: shifted(squares, LEAST), squares=True),
    "whitened": Metric(inputs=shrunk),  # SVD-LLM: output error on task data
    "kronecker": Metric(inputs=shrunk, outputs=shrunk),  # KFAC: second-order estimate of the loss increase
}


def decompose(
    weights: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor] | None = None, inputs: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Full SVD of stacked weights in a metric.

    weights: list of (out_i, in), the layers that share one input basis. outputs: a list, one moment of all rows
    together or one of each layer's, or None; inputs: one moment or None. A moment is what a Metric returns: (n, n),
    (n,) a diagonal, or () a multiple of the identity. Returns `u: (sum out_i, r)`, `s: (r,)` descending, `v: (r, in)`
    in float64 with `cat(weights) = u diag(s) v`, r = min(sum out_i, in). Raises ValueError on non-finite weights.
    """
    w = torch.cat(weights).double()
    if not torch.isfinite(w).all():
        raise ValueError("the weight holds non-finite values")
    whole = outputs is None or len(outputs) == 1
    rows = list(zip(outputs or [None], [len(w)] if whole else map(len, weights), strict=True))
    columns = [(inputs, w.shape[1])]
    if w.shape[0] >= w.shape[1]:
        return _bases(w, rows, columns)
    v, s, u = _bases(w.T, columns, rows)
    return u.T, s, v.T


def _bases(w: torch.Tensor, rows: list[tuple], columns: list[tuple]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`decompose` of w: (M, N) with M >= N. A side's moment is `[(block of its diagonal, size), ...]`."""
    root = [(_root(m), n) for m, n in columns]
    wl = _by_block(lambda r, x: r.T @ x if r.dim() else r * x, root, w.T).T
    weighted = _by_block(lambda m, x: m @ x if m.dim() == 2 else m.reshape(-1, 1) * x, rows, wl)
    gram = wl.new_zeros(wl.shape[1], wl.shape[1])
    add_product(gram, wl, weighted)
    del weighted
    values, v = torch.linalg.eigh(gram)  # reads the lower triangle
    del gram
    s = values.flip(0).clamp_min(LEAST**2 * values[-1]).clamp_min(torch.finfo(values.dtype).tiny).sqrt()
    v = v.flip(1)
    solve = lambda r, x: torch.linalg.solve_triangular(r.T, x, upper=True) if r.dim() else x / r  # noqa: E731
    return (wl @ v).div_(s), s, _by_block(solve, root, v).T


def diagonal(moment: torch.Tensor) -> torch.Tensor:
    """Of (n, n): (n,); a diagonal (n,) itself, and () of a multiple of the identity."""
    return moment.diagonal() if moment.dim() == 2 else moment


def add_product(total: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add `x^T y`, which is symmetric, to the lower triangle of `total: (n, n)`, at little more than half its work."""
    n = x.shape[1]
    if n <= 512:
        total.addmm_(x.T, y)
        return
    half = n // 2
    total[half:, :half].addmm_(x[:, half:].T, y[:, :half])
    add_product(total[:half, :half], x[:, :half], y[:, :half])
    add_product(total[half:, half:], x[:, half:], y[:, half:])


def _root(moment: torch.Tensor | None) -> torch.Tensor | None:
    """A root of a moment that cannot fail: (n, n), () for a multiple of the identity, or None for the identity itself.

    Sums in fp32 can leave eigenvalues below zero. Where there are any, those that fp32 does not resolve beside the
    largest are taken to be as large as it does.
    """
    if moment is None:
        return None
    if not moment.dim():
        return moment.sqrt()
    if moment.dim() == 1:
        return moment.sqrt().diag()
    root, failed = torch.linalg.cholesky_ex(moment)
    if not failed:
        return root
    values, vectors = torch.linalg.eigh(moment)
    root = vectors * values.clamp_min(torch.finfo(torch.float32).eps * values[-1]).sqrt()
    return torch.linalg.qr(root.T).R.T  # triangular, as the other


def _by_block(work: Callable, blocks: list[tuple], x: torch.Tensor) -> torch.Tensor:
    """`work(block, its rows of x)` one under the other; x itself, not a copy, where the block is the identity."""
    if blocks[0][0] is None:
        return x
    return torch.cat([work(m, part) for (m, _), part in zip(blocks, x.split([n for _, n in blocks]), strict=True)])
