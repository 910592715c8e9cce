"""The laws of an estimator, as tests to inherit."""

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

#: Rounding in float64 between two computations that agree in exact arithmetic.
_ROUNDING = 1e-9


class EstimatorContract:
    """The laws that every estimator obeys: inherit the class, define `estimator`, and run pytest.

    All problems are small, in float64, and drawn from the fixed `seeds`.

    Attributes:
        exact: True if the estimator computes the implicit derivative to `tolerance`. Otherwise its error must agree with the
            residual that it reports, unless the class overrides `expected`.
        tolerance: the relative error allowed.
        linear: True if a pullback is linear in the cotangent, as for exact solvers and fixed polynomials.
        nested: True if a level may have others inside that its loss refers to.
        damping: value added to the diagonal of the Hessian; reported residuals include it.
        shapes: names in `SHAPES` of the problems without nesting.
        nested_shapes: names of those with nesting.
        seeds: seeds of the problems.

    Example:
        >>> from mlopt.testing import EstimatorContract
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
        """Return the hypergradient of the outermost level that the estimator should compute, by parameter name.

        The default is the exact one. Override it for an estimator with a closed form of its own, and leave `exact` True.
        """
        return case.gradient

    # Law 1: right.

    def test_right_on_quadratics(self) -> None:
        """On two levels, chains and diamonds, the hypergradient is the expected one, or as near as the estimator claims."""
        for shape in self.shapes:
            for seed in self.seeds:
                case = quadratic(shape, self.estimator(), seed=seed)
                if self.exact:
                    self._agrees(case, f"{shape}, seed {seed}")
        for seed in () if self.exact else self.seeds:
            self._within_its_claim(quadratic("two", self.estimator(), seed=seed), f"two, seed {seed}")

    def test_right_on_logistic_regression(self) -> None:
        """On sample weights for a logistic regression, whose Hessian depends on the point."""
        for seed in self.seeds:
            case = logistic_regression(self.estimator(), seed=seed)
            if self.exact:
                self._agrees(case, f"logistic regression, seed {seed}")
            else:
                self._within_its_claim(case, f"logistic regression, seed {seed}")

    def test_right_when_nested(self) -> None:
        """The gradient of a middle level is a hypergradient; an estimator that does not support this raises."""
        for shape in self.nested_shapes:
            case = quadratic(shape, self.estimator(), seed=self.seeds[0], size=1)
            if self.nested and self.exact:
                self._agrees(case, shape)
            elif not self.nested:
                assert_raises(MloptError, partial(hypergradient, case.problem), f"{shape}: it does not raise")

    def _agrees(self, case: ClosedForm, label: str) -> None:
        expected = self.expected(case)
        error = ClosedForm(case.problem, dict(expected)).error(hypergradient(case.problem).gradient)
        assert error <= self.tolerance, f"{label}: off by {error:.1e}, but tolerance={self.tolerance:.1e}"

    def _within_its_claim(self, case: ClosedForm, label: str) -> None:
        """Assert ||error|| <= ||B|| ||(H + damping)^-1|| ||v|| residual on a problem of two levels."""
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
            f"{label}: off by {error:.1e}, but the residual that it reports, {residual:.1e}, allows {bound:.1e}"
        )

    # Law 2: linear.

    def test_linear_in_the_cotangent(self) -> None:
        """The pullback of a v + b w is a times that of v plus b times that of w, if the estimator is linear."""
        if not self.linear:
            raise unittest.SkipTest("an estimator that is not linear")
        for rule, generator in self._rules():
            v, w = (random_vectors(rule, rule.blocks, generator) for _ in range(2))
            both = {block: axpy(-1.7, w[block], scale(0.6, v[block])) for block in rule.blocks}
            a, b, c = (in_one(rule.pullback(cotangent), rule) for cotangent in (v, w, both))
            gap = float((c - 0.6 * a + 1.7 * b).norm())
            assert gap <= _ROUNDING * (1 + float(a.norm() + b.norm())), f"not linear: off by {gap:.1e}"

    def test_zero_in_zero_out(self) -> None:
        """The pullback of zero is exactly zero, and keeps the same warm-start tensors."""
        for rule, _ in self._rules(warm=True):
            (level,) = rule.blocks[:1]
            kept = rule.point.warm_start(level)
            assert kept is not None
            values = [x.clone() for x in kept]
            result = rule.pullback({block: zeros_like(rule.point.values[block]) for block in rule.blocks})
            assert all(not bool(x.any()) for vectors in result.values() for x in vectors), (
                "the pullback of zero is not zero"
            )
            assert rule.point.warm_start(level) is kept, "a zero cotangent changed the warm start"
            assert same(values, list(kept)), "a zero cotangent changed the warm start in place"

    def test_pullback_and_pushforward_are_transposes(self) -> None:
        """<pullback(v), t> = <v, pushforward(t)>, if there is a pushforward and the pullback is linear."""
        for rule, generator in self._rules():
            if not hasattr(rule.inner, "pushforward") or not self.linear:
                raise unittest.SkipTest("an estimator without a pushforward")
            v, t = random_vectors(rule, rule.blocks, generator), random_vectors(rule, rule.arguments, generator)
            back, forth = paired(rule.pullback(v), t), paired(v, rule.inner.pushforward(t))
            assert abs(back - forth) <= _ROUNDING * (1 + abs(back)), f"not transposes: {back} and {forth}"

    def test_only_what_is_wanted(self) -> None:
        """`wanted` selects arguments and changes nothing else."""
        problem = quadratic("chain_with_shortcuts", self.estimator(), size=1).problem
        rule, generator = Rule(problem, "z"), torch.Generator().manual_seed(0)
        v = random_vectors(rule, rule.blocks, generator)
        everything = rule.pullback(v)
        for argument in rule.arguments:
            some = Rule(problem, "z").pullback(v, [argument])
            assert set(some) <= {argument}, f"wanted=[{argument!r}], but it returned {sorted(some)}"
            assert torch.allclose(flatten(some[argument]), flatten(everything[argument]), rtol=_ROUNDING, atol=0.0)

    # Law 3: each level is pulled back once.

    def test_each_level_is_pulled_back_once(self) -> None:
        """A ladder of diamonds has more paths than levels."""
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
            assert bool(result.gradient["value"].any()), "the hypergradient is zero, so the test proves nothing"
            assert_unmoved(before, snapshot(problem, optimizers), str(dtype))

    def test_nothing_moves_when_a_loss_raises(self) -> None:
        """Displaced variables are restored, for each evaluation that may raise."""
        for fatal in range(1, 6):
            problem = stateful_problem(self.estimator(), fatal=fatal)
            before = snapshot(problem)
            try:
                hypergradient(problem)
            except FloatingPointError:
                assert_unmoved(before, snapshot(problem), f"evaluation {fatal} raised")

    # Law 5: common random numbers.

    def test_common_random_numbers(self) -> None:
        """All evaluations of one call draw the same numbers from every generator; two calls with one seed are bit-equal."""
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
        """The estimate equals the one with the masks of the seed written into the loss."""
        masks: list[list[list[bool]]] = []
        hypergradient(masked(Identity(), None, masks), seed=3)
        mask = torch.tensor(masks[0])
        assert not bool(mask.all()), "the mask drops nothing, so the test proves nothing"
        dropped = hypergradient(masked(self.estimator(), None, []), seed=3).gradient["value"]
        written = hypergradient(masked(self.estimator(), mask, []), seed=3).gradient["value"]
        assert_near(dropped, written, _ROUNDING, "with dropout, and with its masks written out")

    def test_it_draws_from_no_global_generator(self) -> None:
        """A pullback does not depend on the state of the global generators, except through draws of the losses."""
        rules = [next(iter(self._rules()))[0] for _ in range(2)]
        pulled = []
        for seed, rule in enumerate(rules):
            with preserved():
                torch.manual_seed(seed), random.seed(seed), np.random.seed(seed)
                # Linearise again, because that may draw a random start.
                fresh = Rule(rule.point.problem, str(rule.blocks[0]))
                v = random_vectors(fresh, fresh.blocks, torch.Generator().manual_seed(0))
                pulled.append(in_one(fresh.pullback(v), fresh))
        assert torch.equal(*pulled), "it depends on the state of the global generators"

    # Law 6: frozen, unused and tied parameters.

    def test_frozen_unused_and_tied_parameters(self) -> None:
        """A decorated module has the hypergradient of the plain one, and its frozen parameter does not change."""
        for seed in self.seeds:
            plain, decorated = (regression(self.estimator(), seed, kind) for kind in (Plain, Decorated))
            frozen = decorated["network"].module.scale.clone()  # type: ignore[operator]
            a, b = (hypergradient(problem).gradient["value"] for problem in (decorated, plain))
            assert_near(a, b, max(self.tolerance, _ROUNDING), "with and without frozen, unused and tied parameters")
            assert torch.equal(decorated["network"].module.scale, frozen)  # type: ignore[arg-type]

    # Law 7: no silent failure.

    def test_a_loss_that_is_not_finite_raises(self) -> None:
        """The error names the level."""
        for value in (math.nan, math.inf):
            problem = broken(self.estimator(), value)
            error = assert_raises(NonFiniteError, partial(hypergradient, problem), f"a loss of {value} passes")
            assert "'broken'" in str(error), f"the error does not name the level: {error}"

    def test_reports_are_consistent(self) -> None:
        """Counts are not negative, and a reported residual is not smaller than the true one."""
        for seed in self.seeds:
            problem = quadratic("two", self.estimator(), seed=seed).problem
            result = hypergradient(problem)
            report = result.reports["y"]
            check_fields(report)
            if report.residual is not None:
                true = true_residual(problem, flatten(tuple(result.gradient.values())), self.damping)
                assert true <= report.residual * 1.01 + 1e-7, (
                    f"seed {seed}: it reports a residual of {report.residual:.1e}, but the true one is {true:.1e}"
                )

    def _rules(self, *, warm: bool = False) -> Iterator[tuple[Rule, torch.Generator]]:
        """Yield linearised levels, each with a generator for test vectors."""
        places = [("two", "y"), ("diamond", "base"), *([("nested", "y")] if self.nested else [])]
        for shape, level in places:
            for seed in self.seeds:
                generator = torch.Generator().manual_seed(seed)
                yield Rule(quadratic(shape, self.estimator(), seed=seed, size=1).problem, level, warm=warm), generator
