"""The inner product in which a weight is decomposed, and the decomposition itself.

With roots `R R^T = G = E[g g^T]` and `L L^T = A = E[x x^T]`, the SVD of `R^T W L = u' diag(s) v'` maps back to
`u = R^-T u'`, `v = v' L^-1`, so that `W = u diag(s) v` and dropping basis i costs exactly `s_i^2` in the metric
`||R^T (.) L||_F^2`. Any root gives the same u, s, v: two roots of one matrix differ by a rotation, which
the SVD absorbs. That allows the triangular root, about 20 times cheaper than one by eigenvectors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

SHRINKAGE = 1e-2  # of the mean eigenvalue, added to the diagonal


def root(moment, shrinkage=SHRINKAGE):
    """Lower triangular L in float64 with `L L^T = moment + shrinkage * mean eigenvalue * I`; moment: (n, n).

    The shift makes the smallest eigenvalue at least shrinkage/n of the largest. Rounding errors of a float64
    Cholesky are n * 1e-16 of it, so for any n below a million the factorisation cannot break down.
    A moment of shape () stands for that multiple of the identity; so does its root. Raises ValueError on
    a non-finite moment and on one that is zero.
    """
    moment, mean = _checked(moment)
    if not moment.dim():
        return mean.sqrt()
    shifted = moment / mean
    shifted.diagonal().add_(shrinkage)
    return torch.linalg.cholesky(shifted) * mean.sqrt()


def diagonal_root(moment, shrinkage=SHRINKAGE):
    """Square roots (n,) of the diagonal, shrunk like `root`; moment: (n, n), its diagonal (n,), or () as in `root`."""
    moment, mean = _checked(moment.diagonal() if moment.dim() == 2 else moment)
    return (moment + shrinkage * mean).sqrt() if moment.dim() else mean.sqrt()


def _checked(moment):
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
    """How a metric takes the root of A (`inputs`) and of G (`outputs`); None where it uses the identity instead."""

    inputs: Callable | None = None
    outputs: Callable | None = None


METRICS = {
    "plain": Metric(),  # Basel: weight error
    "fisher": Metric(outputs=diagonal_root),  # FWSVD: weight error, rows weighted by their Fisher information
    "whitened": Metric(inputs=root),  # SVD-LLM: output error on task data
    "kronecker": Metric(inputs=root, outputs=root),  # KFAC: second-order estimate of the loss increase
}


def svd(m):
    """`u: (M, r)`, `s: (r,)` descending, `v: (r, N)` with `m = u diag(s) v`; m: (M, N) in float64, r = min(M, N).

    Eigenvectors of the smaller Gram matrix give one side exactly orthonormal; the other is m times them. So the
    product is m to rounding, and the energy of what is dropped is exactly what is lost, whatever the
    conditioning; only directions with s below 1e-8 of the largest are resolved less finely than by a
    bidiagonal SVD, which takes 3 to 6 times as long.
    """
    if m.shape[0] < m.shape[1]:
        u, s, v = svd(m.T)
        return v.T, s, u.T
    v = torch.linalg.eigh(m.T @ m).eigenvectors
    u = m @ v
    s, order = u.norm(dim=0).sort(descending=True)
    u = u[:, order] / s.clamp_min(torch.finfo(m.dtype).tiny)
    return u, s, v[:, order].T


def decompose(weights, output_roots=None, input_root=None):
    """Full SVD of stacked weights in a metric.

    weights: list of (out_i, in), the layers that share one input basis. output_roots: a root for each, or None;
    input_root: one root or None. A root is (n, n) lower triangular, (n,) a diagonal, or () a multiple of the identity.
    Returns `u: (sum out_i, r)`, `s: (r,)` descending, `v: (r, in)` in float64 with
    `cat(weights) = u diag(s) v`, r = min(sum out_i, in). Raises ValueError on non-finite weights.
    """
    output_roots, input_root = [_column(r) for r in output_roots or [None] * len(weights)], _column(input_root)
    m = torch.cat([_times(r, w.double()) for w, r in zip(weights, output_roots, strict=True)])
    m = _times(input_root, m.T).T
    if not torch.isfinite(m).all():
        raise ValueError("the weight holds non-finite values")
    u, s, v = svd(m)
    blocks = zip(u.split([len(w) for w in weights]), output_roots, strict=True)
    return torch.cat([_solve(r, block) for block, r in blocks]), s, _solve(input_root, v.T).T


def _column(r):
    """A root as `_times` and `_solve` take it: triangular, or something that multiplies rows."""
    return torch.ones(1, 1, dtype=torch.float64) if r is None else r if r.dim() == 2 else r.reshape(-1, 1)


def _times(r, m):
    """`r^T m`."""
    return r.T @ m if r.shape[1] > 1 else r * m


def _solve(r, m):
    """`r^-T m`."""
    return torch.linalg.solve_triangular(r.T, m, upper=True) if r.shape[1] > 1 else m / r
