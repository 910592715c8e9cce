"""The Nystrom approximation of a matrix from a few products: a solver, and a preconditioner."""

from __future__ import annotations

import math
from functools import reduce

import attrs
import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..tensors import Tensors, flatten, norm, subtract, unflatten
from ..validation import at_least, positive
from .preconditioner import Preconditioner
from .solver import LinearSolution, LinearSolver, MatVec, SolveCost

__all__ = ["Nystrom", "NystromPreconditioner"]

#: How negative a Ritz value may be through rounding alone, in units of the shift, which is the size of rounding.
_NOISE = 100.0


@attrs.frozen(kw_only=True)
class Nystrom(LinearSolver):
    """x = (U Lambda U^T + damping I)^-1 b, with U Lambda U^T the Nystrom approximation of A from `rank` products.

    With orthonormal random vectors Omega (n, rank), the probes, U Lambda U^T = (A Omega) (Omega^T A Omega)^+ (A Omega)^T. It
    equals A if the rank of A is at most `rank`. Outside the span of U, x = b / damping, which is good if the omitted
    eigenvalues lie below the damping. The solver draws the probes from its own generator, so that x is linear in b. It does not
    iterate and ignores `initial`. One further product measures the residual.

    If A is indefinite, directions of negative curvature among the probes are omitted, that is, their curvature is taken to be
    zero, and the remark says so. The reported curvature consists of the extreme Ritz values of the probes.

    Args:
        rank: the number of probes, one product each; at most n are used. The solver keeps two vectors for each, and a few more.
        damping: added to the diagonal of A, not of the approximation alone; above zero.
        rtol: the solution counts as converged if ||b - (A + damping I) x|| <= rtol ||b||.
        seed: of the probes.

    Source: Hataya & Yamada 2023 (arXiv 2302.09726); Frangella, Tropp & Udell 2021 (arXiv 2110.02820) for the shift that
    stabilises it.

    Example:
        >>> solver = mlopt.linear.Nystrom(rank=1, damping=1.0)
        >>> solution = solver.solve(lambda v: (v[0].sum().expand(3),), (torch.ones(3),))
        >>> torch.allclose(solution.value[0], torch.full((3,), 0.25)), solution.products
        (True, 2)
    """

    rank: int = attrs.field(default=10, validator=at_least(1))
    damping: float = attrs.field(default=1e-2, validator=positive)
    rtol: float = attrs.field(default=1e-3, validator=at_least(0.0))
    seed: int = attrs.field(default=0, validator=at_least(0))

    def cost(self, unknowns: int) -> SolveCost:
        probes = min(self.rank, unknowns)
        return SolveCost(2 * probes + 1, probes + 1)

    def _solve(self, matvec: MatVec, rhs: Tensors, size: float, initial: Tensors | None) -> LinearSolution:
        low_rank = _approximate(matvec, rhs, self.rank, self.damping, self.seed)
        solution = low_rank.combine(rhs, 1 / (low_rank.eigenvalues + self.damping), 1 / self.damping)
        residual = float(norm(subtract(rhs, matvec(solution)))) / size
        remarks = [
            f"negative curvature {low_rank.curvature[0] - self.damping:.3g} treated as zero; raise the damping"
        ] * low_rank.clipped
        if not residual <= 1:
            remarks.append(
                f"worse than no solve: eigenvalues that {low_rank.products} products missed exceed the damping; raise it or the "
                "rank"
            )
        return LinearSolution(
            value=solution,
            residual=residual,
            products=low_rank.products + 1,
            converged=residual <= self.rtol,
            curvature=low_rank.curvature,
            remark="; ".join(remarks),
        )


@attrs.frozen(kw_only=True)
class NystromPreconditioner(Preconditioner):
    """P^-1 = U (lambda + mu) (Lambda + mu)^-1 U^T + (I - U U^T), lambda the smallest of Lambda and mu the damping.

    With U Lambda U^T as in `Nystrom`, it brings the largest eigenvalues of A + mu I down to about lambda + mu and keeps the
    others. Conjugate gradients benefit if a few large eigenvalues stand out. Directions of negative curvature among the probes
    are left alone.

    Args:
        rank: the number of probes, one product each for every solve; at most n are used.
        seed: of the probes.

    Source: Frangella, Tropp & Udell 2021 (arXiv 2110.02820), equation 1.3.

    Example:
        >>> preconditioner = mlopt.linear.NystromPreconditioner(rank=1)
        >>> solver = mlopt.linear.ConjugateGradient(damping=1.0, preconditioner=preconditioner)
        >>> solver.solve(lambda v: (v[0].sum().expand(3),), (torch.arange(3.0),)).converged
        True
    """

    rank: int = attrs.field(default=10, validator=at_least(1))
    seed: int = attrs.field(default=0, validator=at_least(0))

    def cost(self, unknowns: int) -> SolveCost:
        probes = min(self.rank, unknowns)
        return SolveCost(2 * probes, probes)

    def prepare(self, matvec: MatVec, like: Tensors, damping: float) -> tuple[MatVec, int]:
        low_rank = _approximate(matvec, like, self.rank, damping, self.seed)
        damped = low_rank.eigenvalues + damping
        weights = damped.amin() / damped if len(damped) else damped
        return lambda vector: low_rank.combine(vector, weights, 1.0), low_rank.products


@attrs.frozen(kw_only=True, eq=False)
class _LowRank:
    """A ~ U Lambda U^T, positive semi-definite.

    Attributes:
        basis: U^T, orthonormal rows (k, n).
        eigenvalues: Lambda (k,), above zero.
        products: the number of products spent.
        curvature: the extreme Ritz values of the probes, damping included.
        clipped: True if negative ones were omitted.
    """

    basis: Tensor
    eigenvalues: Tensor
    products: int
    curvature: tuple[float, float]
    clipped: bool

    def combine(self, vector: Tensors, inside: Tensor, outside: float) -> Tensors:
        """Return (U diag(inside) U^T + outside (I - U U^T)) v."""
        flat = flatten(vector).to(self.basis.dtype)
        along = (inside - outside) * (self.basis @ flat)
        mixed = torch.addmv(flat, self.basis.T, along, beta=outside)
        return tuple(x.to(y.dtype) for x, y in zip(unflatten(mixed, vector), vector, strict=True))


def _approximate(matvec: MatVec, like: Tensors, rank: int, damping: float, seed: int) -> _LowRank:
    """Return the approximation of A from products with A + damping I."""
    device, n = like[0].device, sum(x.numel() for x in like)
    # There are no factorisations in the half precisions.
    working = reduce(torch.promote_types, (x.dtype for x in like), torch.float32)
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(min(rank, n), n, generator=generator, dtype=working, device=device)
    _orthonormalize(rows)
    image = torch.empty_like(rows)
    for row, out in zip(rows, image, strict=True):
        probe = tuple(x.to(y.dtype) for x, y in zip(unflatten(row, like), like, strict=True))
        torch.cat([x.reshape(-1).to(working) for x in matvec(probe)], out=out)
        if any(x.dtype != working for x in like):
            # The matrix was applied to the probe after its rounding to the vectors' dtype.
            row.copy_(flatten(probe))
    # A shift by rounding, that of the damping included, keeps the division by small Ritz values stable; it is subtracted again
    # at the end.
    shift = torch.finfo(working).eps * float(torch.linalg.matrix_norm(image))
    if not math.isfinite(shift):
        raise NonFiniteError("Nystrom: a product with the Hessian is not finite")
    # The damping belongs beside the approximation, not in it: outside the span of the probes it acts in full.
    image.sub_(rows, alpha=damping)
    core = _products(image, rows, working)
    ritz, vectors = torch.linalg.eigh((core + core.T) / 2)
    image.add_(rows, alpha=shift)
    del rows
    kept = ritz > 0
    eigenvalues, basis = _decompose((vectors[:, kept] / (ritz[kept] + shift).sqrt()).T, image, shift)
    low, high = float(ritz[0]), float(ritz[-1])
    return _LowRank(
        basis=basis,
        eigenvalues=eigenvalues,
        products=len(vectors),
        curvature=(low + damping, high + damping),
        clipped=low < -_NOISE * shift,
    )


def _orthonormalize(rows: Tensor) -> None:
    """Make independent rows orthonormal in place: whiten them by their Gram matrix until it is well conditioned."""
    for _ in range(_PASSES):
        squares, vectors = torch.linalg.eigh(_products(rows, rows, rows.dtype))
        floor = len(rows) * torch.finfo(rows.dtype).eps * squares[-1]
        _multiply((vectors / squares.clamp_min(floor).sqrt()).T.to(rows.dtype), rows)
        if squares[-1] < _WELL * squares[0]:
            return


def _decompose(weights: Tensor, image: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues and eigenvectors of F^T F - shift I, with F = weights @ image; overwrite the image.

    The eigenvectors are the right singular vectors of F. Gram matrices in double precision replace its decomposition, which would
    copy it several times: the first finds the vectors up to rounding over their eigenvalue. That suffices for vectors in single
    precision; a second makes those in double precision orthonormal.
    """
    factor = _multiply(weights, image)
    squares, left = torch.linalg.eigh(_products(factor, factor, weights.dtype))
    above = squares > 2 * shift
    squares, left = squares[above], left[:, above]
    sizes = squares.sqrt()
    basis = _multiply((left / sizes).T, factor)
    if basis.dtype == weights.dtype:
        # F = left diag(sizes) basis, with rows of the basis that are orthonormal but for rounding.
        squares, vectors = torch.linalg.eigh(_products(basis, basis, basis.dtype))
        whiten, root = vectors / squares.sqrt(), vectors * squares.sqrt()
        _, sizes, right = torch.linalg.svd(sizes[:, None] * root)
        basis = _multiply(right @ whiten.T, basis)
    return (sizes.square() - shift).to(image.dtype), basis


#: Columns that are multiplied at a time: their product fits into the cache.
_COLUMNS = 2**13
#: The most passes of orthonormalisation; each but the first of dependent rows removes rounding.
_PASSES = 5
#: A Gram matrix with a condition below this leaves rows that are orthonormal to rounding.
_WELL = 10.0


def _precise(matrix: Tensor) -> torch.dtype:
    """Return the dtype of the small matrices; Apple's devices have no double precision."""
    return matrix.dtype if matrix.device.type == "mps" else torch.float64


def _products(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return A B^T, summed in double precision over parts that are multiplied in `dtype`."""
    total = torch.zeros(len(a), len(b), dtype=_precise(a), device=a.device)
    for part, other in zip(torch.split(a, _COLUMNS, dim=1), torch.split(b, _COLUMNS, dim=1), strict=True):
        wide = part.to(dtype)
        total.add_(wide @ (wide if a is b else other.to(dtype)).T)
    return total


def _multiply(weights: Tensor, matrix: Tensor) -> Tensor:
    """Return W M in the memory of M."""
    product = matrix[: len(weights)]
    for out, part in zip(torch.split(product, _COLUMNS, dim=1), torch.split(matrix, _COLUMNS, dim=1), strict=True):
        out.copy_(weights @ part.to(weights.dtype))
    return product
