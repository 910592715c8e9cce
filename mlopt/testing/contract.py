"""The laws of an estimator as tests, for whoever writes one to inherit."""

from __future__ import annotations

import math
import random
import unittest
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ..errors import MloptError, NonFiniteError
from ..estimators import Identity
from ..hypergradient import hypergradient
from ..problem import Estimator
from ..rng import preserved
from ..tensors import axpy, flatten, scale, zeros_like
from .closed_form import ClosedForm, logistic_regression, quadratic
from .measuring import (
    Counting,
    Rule,
    TwoLevels,
    assert_near,
    assert_raises,
    assert_unmoved,
    check_fields,
    in_one,
    paired,
    random_vectors,
    true_residual,
)
from .shapes import ladder
from .side_effects import same, snapshot, stateful_problem, train_a_little
from .traps import Decorated, Plain, broken, masked, noisy, regression

__all__ = ["EstimatorContract"]

#: What rounding leaves in float64 where two ways of computing are one in exact arithmetic.
_ROUNDING = 1e-9


class EstimatorContract:
    """The laws that every estimator obeys; inherit it, say how to make yours, and run pytest.

    All problems are small, in float64, and drawn from the fixed `seeds`.

    Attributes:
        exact: whether the estimator finds the implicit derivative to `tolerance`. One that does not is held to the residual
            that it reports, unless it overrides `expected`.
        tolerance: the relative error allowed.
        linear: whether a pullback is linear in the cotangent: exact solvers, fixed polynomials.
        nested: whether a level may have others inside that its loss refers to.
        damping: what is added to the diagonal of the Hessian, which reported residuals then include.
        shapes: names in `SHAPES` of the problems without nesting that it is held to.
        nested_shapes: those with nesting.
        seeds: of the problems.

    Example:
        >>> class TestMine(EstimatorContract):
        ...     def estimator(self):
        ...         return mlopt.ConjugateGradient(iterations=50, rtol=1e-12)
        >>> TestMine().test_right_on_quadratics()
    """

    exact: bool = True
    tolerance: float = 1e-6
    linear: bool = True
    nested: bool = False
    damping: float = 0.0
    shapes: Sequence[str] = ("two", "chain_of_three", "chain_with_shortcuts", "diamond")
    nested_shapes: Sequence[str] = ("nested", "nested_and_referred_to")
    seeds: Sequence[int] = range(3)

    def estimator(self) -> Estimator:
        """Return the estimator under test, a new one at each call."""
        raise NotImplementedError("EstimatorContract: define estimator(self), which returns the estimator under test")

    def expected(self, case: ClosedForm) -> Mapping[str, Tensor]:
        """Return the hypergradient of the outermost level that the estimator is to find on a problem, by parameter name.

        The default is the exact one. Override it for an estimator with a closed form of its own, and leave `exact` True.
        """
        return case.gradient

    # Law 1: right.

    def test_right_on_quadratics(self) -> None:
        """Two levels, chains and diamonds: what is found is what is expected, or as near as is claimed."""
        for shape in self.shapes:
            for seed in self.seeds:
                case = quadratic(shape, self.estimator(), seed=seed)
                if self.exact:
                    self._agrees(case, f"{shape}, seed {seed}")
        for seed in () if self.exact else self.seeds:
            self._within_its_claim(quadratic("two", self.estimator(), seed=seed), f"two, seed {seed}")

    def test_right_on_logistic_regression(self) -> None:
        """The choice of sample weights, where the Hessian moves with the point."""
        for seed in self.seeds:
            case = logistic_regression(self.estimator(), seed=seed)
            if self.exact:
                self._agrees(case, f"logistic regression, seed {seed}")
            else:
                self._within_its_claim(case, f"logistic regression, seed {seed}")

    def test_right_when_nested(self) -> None:
        """A middle level whose own gradient is a hypergradient; an estimator that cannot do so is refused, not wrong."""
        for shape in self.nested_shapes:
            case = quadratic(shape, self.estimator(), seed=self.seeds[0], size=1)
            if self.nested and self.exact:
                self._agrees(case, shape)
            elif not self.nested:
                assert_raises(MloptError, partial(hypergradient, case.problem), f"{shape}: it is not refused")

    def _agrees(self, case: ClosedForm, label: str) -> None:
        expected = self.expected(case)
        error = ClosedForm(case.problem, dict(expected)).error(hypergradient(case.problem).gradient)
        assert error <= self.tolerance, f"{label}: off by {error:.1e}, and tolerance={self.tolerance:.1e}"

    def _within_its_claim(self, case: ClosedForm, label: str) -> None:
        """||error|| <= ||B|| ||(H + damping)^-1|| ||v|| residual, of a problem of two levels."""
        result = hypergradient(case.problem)
        residual = next(iter(result.reports.values())).residual
        assert residual is not None, (
            f"{label}: it is not exact and reports no residual: set `exact`, override `expected`, or report one"
        )
        parts = TwoLevels(case.problem)
        inverse = torch.linalg.inv(parts.hessian + self.damping * torch.eye(len(parts.hessian), dtype=torch.float64))
        exact = parts.direct - parts.mixed.T @ inverse @ parts.cotangent
        error = float((flatten(tuple(result.gradient.values())) - exact).norm())
        bound = float(torch.linalg.matrix_norm(parts.mixed, 2) * torch.linalg.matrix_norm(inverse, 2)) * residual
        bound *= float(parts.cotangent.norm())
        assert error <= bound * (1 + 1e-6) + _ROUNDING, (
            f"{label}: off by {error:.1e}, and the residual that it reports, {residual:.1e}, allows {bound:.1e}"
        )

    # Law 2: linear.

    def test_linear_in_the_cotangent(self) -> None:
        """The pullback of a v + b w is a times that of v plus b times that of w, where the estimator is linear."""
        if not self.linear:
            raise unittest.SkipTest("an estimator that is not linear")
        for rule, generator in self._rules():
            v, w = (random_vectors(rule, rule.blocks, generator) for _ in range(2))
            both = {block: axpy(-1.7, w[block], scale(0.6, v[block])) for block in rule.blocks}
            one, two, three = (in_one(rule.pullback(c), rule) for c in (v, w, both))
            gap = float((three - 0.6 * one + 1.7 * two).norm())
            assert gap <= _ROUNDING * (1 + float(one.norm() + two.norm())), f"not linear: off by {gap:.1e}"

    def test_zero_in_zero_out(self) -> None:
        """A zero cotangent gives exactly zero, and a warm start stays the very tensors that it was."""
        for rule, _ in self._rules(warm=True):
            (level,) = rule.blocks[:1]
            kept = rule.point.warm_start(level)
            assert kept is not None
            values = [x.clone() for x in kept]
            found = rule.pullback({block: zeros_like(rule.point.values[block]) for block in rule.blocks})
            assert all(not bool(x.any()) for vectors in found.values() for x in vectors), "zero in, and not zero out"
            assert rule.point.warm_start(level) is kept, "a zero cotangent changed the warm start"
            assert same(values, list(kept)), "a zero cotangent changed the warm start in place"

    def test_pullback_and_pushforward_are_transposes(self) -> None:
        """<pullback(v), t> = <v, pushforward(t)>, where there is a pushforward and the pullback is linear."""
        for rule, generator in self._rules():
            if not hasattr(rule.inner, "pushforward") or not self.linear:
                raise unittest.SkipTest("an estimator without a pushforward")
            v, t = random_vectors(rule, rule.blocks, generator), random_vectors(rule, rule.arguments, generator)
            back, forth = paired(rule.pullback(v), t), paired(v, rule.inner.pushforward(t))
            assert abs(back - forth) <= _ROUNDING * (1 + abs(back)), f"{back} and {forth} are no transposes"

    def test_only_what_is_wanted(self) -> None:
        """`wanted` chooses among the arguments, and changes nothing else."""
        problem = quadratic("chain_with_shortcuts", self.estimator(), size=1).problem
        rule, generator = Rule(problem, "z"), torch.Generator().manual_seed(0)
        v = random_vectors(rule, rule.blocks, generator)
        everything = rule.pullback(v)
        for argument in rule.arguments:
            some = Rule(problem, "z").pullback(v, [argument])
            assert set(some) <= {argument}, f"asked for {argument!r} alone, it gave {sorted(some)}"
            assert torch.allclose(flatten(some[argument]), flatten(everything[argument]), rtol=_ROUNDING, atol=0.0)

    # Law 3: each level is pulled back once.

    def test_each_level_is_pulled_back_once(self) -> None:
        """On a ladder of diamonds, with more paths than levels."""
        counting = Counting(self.estimator())
        problem = quadratic(ladder(2), counting, size=1).problem
        result = hypergradient(problem)
        once = {level.name: 1 for level in problem if level is not problem.outermost}
        assert dict(counting.pullbacks) == once, f"pulled back {dict(counting.pullbacks)}"
        assert set(result.reports) == set(once), f"reports of {sorted(result.reports)}"

    # Law 4: nothing moves.

    def test_nothing_moves(self) -> None:
        """Parameters, buffers of BatchNorm and others, optimisers, `.grad`, modes and generators are bit-identical."""
        for dtype in (torch.float32, torch.float64):
            problem = stateful_problem(self.estimator(), dtype=dtype)
            optimizers = train_a_little(problem)
            before = snapshot(problem, optimizers)
            result = hypergradient(problem)
            assert bool(result.gradient["value"].any()), "a hypergradient of zero proves nothing"
            assert_unmoved(before, snapshot(problem, optimizers), str(dtype))

    def test_nothing_moves_when_a_loss_raises(self) -> None:
        """Whichever evaluation it is: displaced variables come back."""
        for fatal in range(1, 6):
            problem = stateful_problem(self.estimator(), fatal=fatal)
            before = snapshot(problem)
            try:
                hypergradient(problem)
            except FloatingPointError:
                assert_unmoved(before, snapshot(problem), f"evaluation {fatal} raised")

    # Law 5: common random numbers.

    def test_common_random_numbers(self) -> None:
        """All evaluations of one call draw the same, whichever generator they use; two calls at a seed are bit-equal."""
        draws: list[tuple[float, float, float]] = []
        hypergradient(noisy(Identity(), draws), seed=1)
        allowed = set(draws)
        problem = noisy(self.estimator(), draws)
        first = hypergradient(problem, seed=1).gradient["value"]
        assert set(draws) == allowed, f"{len(set(draws))} different draws in one pullback"
        with preserved():
            torch.rand(7), random.random(), np.random.rand()
            second = hypergradient(problem, seed=1).gradient["value"]
        assert torch.equal(first, second), "two calls with the same seed and batches differ"

    def test_dropout_is_that_of_one_mask(self) -> None:
        """The estimate is the one for the very masks that the seed draws: as if they had been written into the loss."""
        masks: list[list[list[bool]]] = []
        hypergradient(masked(Identity(), None, masks), seed=3)
        mask = torch.tensor(masks[0])
        assert not bool(mask.all()), "the mask drops nothing: it proves nothing"
        dropped = hypergradient(masked(self.estimator(), None, []), seed=3).gradient["value"]
        written = hypergradient(masked(self.estimator(), mask, []), seed=3).gradient["value"]
        assert_near(dropped, written, _ROUNDING, "with dropout, and with its masks written out")

    def test_it_draws_from_no_global_generator(self) -> None:
        """A pullback is the same wherever the generators stand, and leaves them there, but for what the losses draw."""
        rules = [next(iter(self._rules()))[0] for _ in range(2)]
        found = []
        for seed, rule in enumerate(rules):
            with preserved():
                torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
                # From the very beginning: a random start may be drawn when the level is linearised.
                fresh = Rule(rule.point.problem, str(rule.blocks[0]))
                v = random_vectors(fresh, fresh.blocks, torch.Generator().manual_seed(0))
                found.append(in_one(fresh.pullback(v), fresh))
        assert torch.equal(*found), "it depends on where the global generators stand"

    # Law 6: frozen, unused and tied parameters.

    def test_frozen_unused_and_tied_parameters(self) -> None:
        """A decorated module gives the hypergradient of the plain one, and what is frozen stays as it is."""
        for seed in self.seeds:
            plain, decorated = (regression(self.estimator(), seed, kind) for kind in (Plain, Decorated))
            frozen = decorated["network"].module.scale.clone()  # type: ignore[operator]
            found = hypergradient(decorated).gradient["value"]
            expected = hypergradient(plain).gradient["value"]
            assert_near(
                found, expected, max(self.tolerance, _ROUNDING), "with frozen, unused and tied parameters, and without"
            )
            assert torch.equal(decorated["network"].module.scale, frozen)  # type: ignore[arg-type]

    # Law 7: no silent failure.

    def test_a_loss_that_is_not_finite_raises(self) -> None:
        """And the error names the level."""
        for value in (math.nan, math.inf):
            problem = broken(self.estimator(), value)
            error = assert_raises(NonFiniteError, partial(hypergradient, problem), f"a loss of {value} passes")
            assert "'broken'" in str(error), f"the error does not name the level: {error}"

    def test_reports_are_consistent(self) -> None:
        """What is said was measured: counts are counts, and a residual is no smaller than the true one."""
        for seed in self.seeds:
            problem = quadratic("two", self.estimator(), seed=seed).problem
            result = hypergradient(problem)
            report = result.reports["y"]
            check_fields(report)
            if report.residual is not None:
                true = true_residual(problem, flatten(tuple(result.gradient.values())), self.damping)
                assert true <= report.residual * 1.01 + 1e-7, (
                    f"seed {seed}: it reports a residual of {report.residual:.1e}, and the true one is {true:.1e}"
                )

    def _rules(self, *, warm: bool = False) -> Iterator[tuple[Rule, torch.Generator]]:
        """Return linearised levels, and a generator for the vectors that they are tried on."""
        places = [("two", "y"), ("diamond", "base"), *([("nested", "y")] if self.nested else [])]
        for shape, level in places:
            for seed in self.seeds:
                generator = torch.Generator().manual_seed(seed)
                yield Rule(quadratic(shape, self.estimator(), seed=seed, size=1).problem, level, warm=warm), generator
