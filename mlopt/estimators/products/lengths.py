"""The lengths over which a term's first derivatives bend, which decide the steps of differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import attrs
import torch

from ...problem import Block, Term, Vectors
from ...shards import sharded_as
from ...tensors import Tensors, norm, subtract
from .difference import Difference

__all__ = ["SMALL", "Moves", "moves_of", "search"]

#: Two steps, one a tenth of the other, whose differences agree this closely need no search.
_AGREEMENT = {torch.float64: 1e-7, torch.float32: 3e-3}
#: Norm of the variables below which their size says little about a step: one step of training leaves zeros at any size.
SMALL = 0.1
#: The smallest length that is tried for variables that are zero.
_SMALLEST = 1e-8
#: Displacement of one tensor, relative to its own norm, above which one step for all tensors is in doubt.
_FAR = {torch.float64: 1e-3}
#: Tensors are moved together if their norms differ by less than this factor.
_SPREAD = 100.0
#: The factor on the step of all tensors together that is tried before they move in groups, at the cost of a group each.
_SHORTER = 0.1
#: Disagreement below which a larger one at a shorter step shows that rounding has taken over.
_ROUNDED = 0.3
#: Relative disagreement of the best two steps at which differences are worthless.
_WORTHLESS = 0.5


@attrs.frozen(eq=False)
class Moves:
    """The way to take differences of a term along some blocks: groups of variables that move one after the other.

    Attributes:
        groups: the indices of the variables in each group, None for all; and the least norm that a step is scaled by.
        error: the relative disagreement of two steps; None if none was needed.
        small: True if the variables are so small that their size says little about a step.
        factor: the factor on the usual step, below one if tensors of different sizes move together.
    """

    groups: tuple[tuple[tuple[int, ...] | None, float], ...] = ((None, 1.0),)
    error: float | None = None
    small: bool = False
    factor: float = 1.0

    @property
    def remark(self) -> str:
        """A sentence if no step suits the variables, else ""."""
        if not self.small or self.error is None or self.error < _WORTHLESS:
            return ""
        return (
            f"differences at two steps disagree by {self.error:.0%}, at every step from the variables' own size to one: use "
            "products='autograd', float64, or variables of another scale"
        )


def moves_of(term: Term, direction: Vectors, wanted: Sequence[Block]) -> Moves | None:
    """Return the moves for differences along a direction, None if it is zero; they are measured once for each term and blocks.

    Variables of norm one and more are moved by a fraction of their norm, all by one step. Smaller ones may be of that size, or
    just have left zero, and one step may be too long for the small tensors of a block. Where that is in doubt, differences at
    ever shorter steps are compared, and the step is kept at which two of them agree best. Tensors of different sizes move by a
    shorter step together, at the cost of one difference, unless that step suffers from rounding; then they move in groups.
    """
    lengths = term.point.workspace.lengths
    key = "/".join([*term.label, *sorted(map(str, direction)), "by", *sorted(map(str, wanted))])
    if key not in lengths:
        measured = _measure(term, direction, wanted)
        if measured is None:
            return None
        lengths[key] = measured.groups, measured.error, measured.small, measured.factor
    return Moves(*lengths[key])


def _measure(term: Term, direction: Vectors, wanted: Sequence[Block]) -> Moves | None:
    whole = Difference(term, direction, wanted)
    along, sizes = ([float(norm((x.detach(),))) for x in vectors] for vectors in (whole.along, whole.moved))
    step, reach = math.hypot(*along), math.hypot(*sizes)
    if not (math.isfinite(step) and math.isfinite(reach)) or step == 0.0:
        return None
    direction = _filled(
        direction, [0.0 if v else step * (x / reach if reach else 1.0) for v, x in zip(along, sizes, strict=True)]
    )
    whole = Difference(term, direction, wanted)
    small = reach < SMALL
    pairs = zip(along, sizes, strict=True)
    far = max(v * reach / (step * x) if x else math.inf for v, x in pairs if v) * whole.relative_step
    if not small and far <= _FAR.get(whole.moved[0].dtype, 0.03):
        return Moves()
    good = _AGREEMENT.get(whole.moved[0].dtype, 0.1)
    floor, error, _ = search(partial(_at, whole), reach, good)
    together = Moves(((None, floor),), error, small)
    if error > good:
        shorter = _gap(*(_at(whole, fraction * max(floor, reach)) for fraction in (_SHORTER, _SHORTER / 10)))
        if shorter < error / 2:
            error, together = shorter, Moves(((None, floor),), shorter, small, _SHORTER)
    groups = _groups(sizes)
    if error <= good or len(groups) == 1:
        return together
    apart, total, doubt = [], None, 0.0
    for group in groups:
        part = Difference(term, direction, wanted, group)
        floor, gap, value = search(partial(_at, part), math.hypot(*(sizes[k] for k in group)), good)
        doubt = math.hypot(doubt, gap * float(norm(value)))
        total = value if total is None else tuple(a + b for a, b in zip(total, value, strict=True))
        apart.append((group, floor))
    assert total is not None
    doubt /= max(float(norm(total)), math.ulp(0.0))
    return Moves(tuple(apart), doubt, small) if doubt < error / 2 else together


def _filled(direction: Vectors, norms: Sequence[float]) -> Vectors:
    """Return a direction with random vectors of these norms added to it: the next direction may move what this one does not."""
    generator, rest = torch.Generator().manual_seed(0), iter(norms)
    filled = {}
    for block, vectors in direction.items():
        added = []
        for x in vectors:
            drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64, device="cpu")
            added.append((x + (next(rest) / (float(drawn.norm()) or 1.0)) * sharded_as(drawn, x)).to(x.dtype))
        filled[block] = tuple(added)
    return filled


def _groups(sizes: Sequence[float]) -> list[tuple[int, ...]]:
    """Return groups of tensors of similar norms; tensors of zeros move with the largest."""
    order = sorted((k for k, size in enumerate(sizes) if size), key=sizes.__getitem__)
    groups: list[list[int]] = []
    for k in order:
        if groups and sizes[k] < _SPREAD * sizes[groups[-1][0]]:
            groups[-1].append(k)
        else:
            groups.append([k])
    zeros = [k for k, size in enumerate(sizes) if not size]
    if not groups:
        return [tuple(zeros)]
    groups[-1] += zeros
    return [tuple(sorted(group)) for group in groups]


def search(at: Callable[[float], Tensors], reach: float, good: float) -> tuple[float, float, Tensors]:
    """Return the least size to scale steps by, the relative disagreement of two steps there, and the difference.

    Differences are compared at steps for variables of the size one, a tenth, and so on, down to their own size. A size below one
    is returned only if it is better by far than one.

    Args:
        at: returns the difference, given the size of the variables.
        reach: their own size.
        good: a disagreement that needs no further search.
    """
    size, last = max(reach, 1.0), max(reach, _SMALLEST)
    previous = at(size)
    tried: list[tuple[float, float, Tensors]] = []
    while True:
        finer = at(size / 10)
        tried.append((size, _gap(previous, finer), previous))
        gap, before = tried[-1][1], tried[-2][1] if len(tried) > 1 else math.inf
        if gap <= good or size <= last or before < min(gap, _ROUNDED):
            break
        size, previous = size / 10, finer
    best = min(tried, key=lambda entry: entry[1])
    if not best[1] < tried[0][1] / 2:
        best = tried[0]
    return min(best[0], 1.0), best[1], best[2]


def _at(difference: Difference, size: float) -> Tensors:
    step = difference.step(torch.full_like(difference.reach(), size))
    return tuple(x for vectors in difference(step).values() for x in vectors)


def _gap(a: Tensors, b: Tensors) -> float:
    """Return the relative distance of two vectors; infinite if one of them is not finite."""
    size = max(float(norm(a)), float(norm(b)))
    if not math.isfinite(size):
        return math.inf
    return float(norm(subtract(a, b))) / size if size else 0.0
