"""The contract for people who write an estimator: every named one keeps it, and each law catches the fault it is about."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from core_cases import conjugate_gradient
from torch import Tensor

import mlopt
from mlopt.problem import Block, Carryover, Linearization, Objective, Point, Vectors
from mlopt.tensors import Tensors, add, dot, scale, zeros_like
from mlopt.testing import ClosedForm, EstimatorContract


class TestDense(EstimatorContract):
    nested = True
    tolerance = 1e-8

    def estimator(self) -> mlopt.Estimator:
        return mlopt.Dense()


class TestDenseForward(TestDense):
    # Forward products of a nested level take seconds.
    nested_shapes = ("nested",)
    seeds = (1,)

    def estimator(self) -> mlopt.Estimator:
        return mlopt.Dense(products="forward")


class TestConjugateGradient(EstimatorContract):
    nested = True
    tolerance = 1e-8

    def estimator(self) -> mlopt.Estimator:
        return conjugate_gradient()


class TestConjugateGradientByDifferences(EstimatorContract):
    nested = True
    tolerance = 1e-4
    linear = False  # the step of a difference depends on the vector

    def estimator(self) -> mlopt.Estimator:
        return conjugate_gradient("finite_difference")


class TestConjugateGradientWithAHistory(TestConjugateGradient):
    def estimator(self) -> mlopt.Estimator:
        return mlopt.ConjugateGradient(iterations=200, rtol=1e-13, history=5)


class TestFewConjugateGradients(EstimatorContract):
    """Not exact, and not linear: held to the residual that it reports."""

    exact = False
    linear = False
    nested = True

    def estimator(self) -> mlopt.Estimator:
        return mlopt.ConjugateGradient(iterations=2)


class TestDampedConjugateGradients(EstimatorContract):
    exact = False
    linear = False
    nested = True
    damping = 0.3

    def estimator(self) -> mlopt.Estimator:
        return mlopt.ConjugateGradient(iterations=2, damping=0.3)


class TestNeumann(EstimatorContract):
    nested = True
    nested_shapes = ("nested",)
    linear = False  # the step size found depends on the vector

    def estimator(self) -> mlopt.Estimator:
        return mlopt.Neumann(iterations=80, rtol=1e-9)


class TestShortNeumann(EstimatorContract):
    """A fixed polynomial: linear, and as far off as it says."""

    exact = False
    nested = True

    def estimator(self) -> mlopt.Estimator:
        return mlopt.Neumann(iterations=3, step_size=0.1)


class TestMINRES(EstimatorContract):
    nested = True
    tolerance = 1e-8

    def estimator(self) -> mlopt.Estimator:
        return mlopt.MINRES(iterations=200, rtol=1e-13)


class TestFewMINRES(EstimatorContract):
    exact = False
    linear = False
    nested = True

    def estimator(self) -> mlopt.Estimator:
        return mlopt.MINRES(iterations=2)


class TestNystrom(EstimatorContract):
    """The probes are the same for every cotangent, so that a pullback is linear."""

    exact = False
    nested = True
    damping = 0.1

    def estimator(self) -> mlopt.Estimator:
        return mlopt.Nystrom(rank=10, damping=0.1)


class TestPreconditionedConjugateGradient(EstimatorContract):
    nested = True
    tolerance = 1e-8

    def estimator(self) -> mlopt.Estimator:
        preconditioner = mlopt.linear.NystromPreconditioner(rank=2)
        return mlopt.ConjugateGradient(iterations=200, rtol=1e-13, preconditioner=preconditioner)


class TestKFACConjugateGradient(EstimatorContract):
    nested = True
    tolerance = 1e-8

    def estimator(self) -> mlopt.Estimator:
        return mlopt.ConjugateGradient(iterations=200, rtol=1e-13, preconditioner=mlopt.KFACPreconditioner())


class TestGaussNewton(EstimatorContract):
    """The modules of these problems return their variables, so that the matrix is the Hessian."""

    def estimator(self) -> mlopt.Estimator:
        return mlopt.Dense(products="gauss_newton")


class TestValueFunction(EstimatorContract):
    tolerance = 1e-5
    linear = False  # the size of the penalty depends on the cotangent
    steps, rate = 250, 0.5

    def estimator(self) -> mlopt.Estimator:
        # A larger penalty than the default: these are quadratics, or nearly, and its rounding would show in the residual.
        return mlopt.ValueFunction(steps=self.steps, step_size=self.rate, perturbation=1e-3)

    def test_frozen_unused_and_tied_parameters(self) -> None:
        self.steps, self.rate = 5, 0.05  # the problem is steeper than the others
        super().test_frozen_unused_and_tied_parameters()


class TestUnrolled(EstimatorContract):
    """From a solution, many steps of gradient descent are a Neumann series of as many terms."""

    tolerance = 1e-5
    steps, rate = 250, 0.5
    seeds = (0, 1)

    def estimator(self) -> mlopt.Estimator:
        torchopt = pytest.importorskip("torchopt", reason="Unrolled takes TorchOpt's optimisers: the extra `unroll`")
        return mlopt.Unrolled(steps=self.steps, optimizer=torchopt.sgd(self.rate))

    def test_frozen_unused_and_tied_parameters(self) -> None:
        self.steps, self.rate = 5, 0.05  # the problem is steeper than the others
        super().test_frozen_unused_and_tied_parameters()


def take_inverse_for_identity(case: ClosedForm, factor: float = 1.0) -> dict[str, Tensor]:
    """Return the hypergradient with -B^T v, times a factor, in place of every -B^T H^-1 v, by plain autograd."""
    problem = case.problem
    losses, cotangents = {}, {}
    for level in problem:
        batch = None if level.data is None else next(iter(level.data))
        losses[level.name] = level.loss(level.module, batch, **{ref: problem[ref].module for ref in level.references})
    for name in problem.graph[problem.outermost.name].parts:
        cotangents[name] = zeros_like(problem[name].parameters)
    outer = problem.outermost.name
    cotangents[outer] = zeros_like(problem.outermost.parameters)
    for name in cotangents:
        pulled = torch.autograd.grad(
            losses[outer], problem[name].parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        cotangents[name] = add(cotangents[name], pulled)
    for part in problem.graph[outer].parts:
        slope = torch.autograd.grad(losses[part], problem[part].parameters, create_graph=True)
        inner = dot(slope, cotangents[part])
        for name in problem[part].references:
            back = torch.autograd.grad(
                inner, problem[name].parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            cotangents[name] = add(cotangents[name], scale(-factor, back))
    return dict(zip(case.gradient, cotangents[outer], strict=True))


class TestIdentity(EstimatorContract):
    """Its own closed form, and no residual; a nested level's Hessian is another matter, so nothing is claimed there."""

    nested = True
    nested_shapes = ()
    tolerance = 1e-9

    def estimator(self) -> mlopt.Estimator:
        return mlopt.Identity()

    def expected(self, case: ClosedForm) -> Mapping[str, Tensor]:
        return take_inverse_for_identity(case)


class TestScaledIdentity(TestIdentity):
    def estimator(self) -> mlopt.Estimator:
        return mlopt.Identity(scale=0.3)

    def expected(self, case: ClosedForm) -> Mapping[str, Tensor]:
        return take_inverse_for_identity(case, 0.3)


class TestFiniteDifference(TestIdentity):
    linear = False
    tolerance = 1e-7

    def estimator(self) -> mlopt.Estimator:
        return mlopt.FiniteDifference()


class SteppedBySGD(mlopt.Estimator):
    """SAMA on levels that come without an optimiser."""

    def linearize(self, point: Point, level: str) -> Linearization:
        point.carryover = point.carryover or Carryover()
        point.carryover.optimizers = {level: torch.optim.SGD(point.problem[level].parameters, lr=0.3)}
        return mlopt.SAMA(products="autograd").linearize(point, level)


class TestSAMA(TestIdentity):
    """For SGD the identity times the learning rate; other optimisers have tests of their own."""

    nested = False
    nested_shapes = ("nested",)

    def estimator(self) -> mlopt.Estimator:
        return SteppedBySGD()

    def expected(self, case: ClosedForm) -> Mapping[str, Tensor]:
        return take_inverse_for_identity(case, 0.3)


class Faulty(mlopt.Estimator):
    """A dense estimator with a fault: subclasses break what comes out, or how."""

    def linearize(self, point: Point, level: str) -> Linearization:
        rule = mlopt.Dense().linearize(point, level)
        self.begin(point, level)
        pullback = rule.pullback

        def broken(cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
            pulled = pullback(self.distort(cotangent, point), wanted)
            self.finish(point, level, rule)
            return {block: self.spoil(vectors) for block, vectors in pulled.items()}

        rule.pullback = broken  # type: ignore[method-assign]
        return rule

    def begin(self, point: Point, level: str) -> None: ...

    def distort(self, cotangent: Vectors, point: Point) -> Vectors:
        return cotangent

    def finish(self, point: Point, level: str, rule: Linearization) -> None: ...

    def spoil(self, vectors: Tensors) -> Tensors:
        return vectors


class WrongSign(Faulty):
    def spoil(self, vectors: Tensors) -> Tensors:
        return scale(-1.0, vectors)


class ForgetsToRestore(Faulty):
    def finish(self, point: Point, level: str, rule: Linearization) -> None:
        point.problem[level].parameters[0].data.mul_(1 + 1e-6)


class RestoresBySubtracting(Faulty):
    """Right but for the last bit, in float32."""

    def finish(self, point: Point, level: str, rule: Linearization) -> None:
        for variable in point.problem[level].parameters:
            variable.data.add_(0.37).sub_(0.37)


class LeavesTheDisplaced(Faulty):
    """Restores where all goes well, and not where a loss raises."""

    def begin(self, point: Point, level: str) -> None:
        live = [variable.data for variable in point.problem[level].parameters]
        kept = [variable.clone() for variable in live]
        torch._foreach_add_(live, 1e-3)
        Objective.of(point.problem[level], point).value()
        torch._foreach_copy_(live, kept)


class LeavesAGradient(Faulty):
    def begin(self, point: Point, level: str) -> None:
        Objective.of(point.problem[level], point).value().backward()


class MovesBuffers(Faulty):
    """Evaluates the loss itself, on the module's own buffers."""

    def begin(self, point: Point, level: str) -> None:
        chosen = point.problem[level]
        chosen.loss(chosen.module, None, **{ref: point.problem[ref].module for ref in chosen.references})


class DrawsFromTheGlobalGenerator(Faulty):
    def begin(self, point: Point, level: str) -> None:
        self.noise = float(torch.rand(()))

    def distort(self, cotangent: Vectors, point: Point) -> Vectors:
        return {block: scale(1 + 1e-9 * self.noise, vectors) for block, vectors in cotangent.items()}


class ForgetsTheMask(Faulty):
    """Linearises at draws of its own."""

    def linearize(self, point: Point, level: str) -> Linearization:
        moved = mlopt.rng.GeneratorState.seeded(99)
        other = Point(point.problem, point.batches, {**point.generators, level: moved}, carryover=point.carryover)
        return mlopt.Dense().linearize(other, level)


class Nonlinear(Faulty):
    def distort(self, cotangent: Vectors, point: Point) -> Vectors:
        return {block: tuple(v + 1e-4 * v * v for v in vectors) for block, vectors in cotangent.items()}


class AddsAConstant(Faulty):
    def distort(self, cotangent: Vectors, point: Point) -> Vectors:
        return {block: tuple(v + 1e-12 for v in vectors) for block, vectors in cotangent.items()}


class TouchesTheWarmStart(Faulty):
    def finish(self, point: Point, level: str, rule: Linearization) -> None:
        if point.carryover is not None:
            point.carryover.warm[level] = scale(1.0, point.carryover.warm[level])


class IgnoresFrozen(Faulty):
    """Takes every parameter for a variable, frozen ones and those of other names, too."""

    def linearize(self, point: Point, level: str) -> Linearization:
        module = point.problem[level].module
        frozen = [p for p in module.parameters() if not p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
            parameter.data.mul_(1.01)
        return mlopt.Dense().linearize(point, level)


class PullsBackTwice(Faulty):
    def linearize(self, point: Point, level: str) -> Linearization:
        rule = mlopt.Dense().linearize(point, level)
        # Both, for good measure: an estimator calls the public method of what it made.
        pullback = rule.pullback
        holder: dict[str, Any] = {}

        def again(cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
            if holder.setdefault("first", True):
                holder["first"] = False
                rule.pullback(cotangent, wanted)
            return pullback(cotangent, wanted)

        rule.pullback = again  # type: ignore[method-assign]
        return rule


class HidesWhatIsNotFinite(Faulty):
    def spoil(self, vectors: Tensors) -> Tensors:
        return tuple(torch.nan_to_num(v) for v in vectors)

    def linearize(self, point: Point, level: str) -> Linearization:
        rule = super().linearize(point, level)
        pullback = rule.pullback

        def silent(cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
            try:
                return pullback(cotangent, wanted)
            except mlopt.NonFiniteError:
                return {a: zeros_like(point.values[a]) for a in rule.arguments}

        rule.pullback = silent  # type: ignore[method-assign]
        return rule


class Boasts(Faulty):
    """Solves badly, and reports a residual of zero."""

    def linearize(self, point: Point, level: str) -> Linearization:
        rule = mlopt.ConjugateGradient(iterations=1).linearize(point, level)
        pullback = rule.pullback

        def boasting(cotangent: Vectors, wanted: Sequence[str] | None = None) -> dict[Block, Tensors]:
            pulled = pullback(cotangent, wanted)
            rule.report.residual = 0.0
            return pulled

        rule.pullback = boasting  # type: ignore[method-assign]
        return rule


class ContradictsItself(Faulty):
    def finish(self, point: Point, level: str, rule: Linearization) -> None:
        rule.report.residual = None


class GivesTooMuch(Faulty):
    def linearize(self, point: Point, level: str) -> Linearization:
        rule = mlopt.Dense().linearize(point, level)
        pullback = rule.pullback
        rule.pullback = lambda cotangent, wanted=None: pullback(cotangent)  # type: ignore[method-assign]
        return rule


class PushesTheOtherWay(Faulty):
    def linearize(self, point: Point, level: str) -> Linearization:
        rule: Any = mlopt.Dense().linearize(point, level)
        forward = rule.pushforward
        rule.pushforward = lambda tangent: {block: scale(-1.0, v) for block, v in forward(tangent).items()}
        return rule


def contract(rule: type[mlopt.Estimator], **settings: Any) -> EstimatorContract:
    """Return the contract of an estimator."""
    return type("Contract", (EstimatorContract,), {"estimator": lambda self: rule(), **settings})()


#: Each fault, and a law that must catch it.
FAULTS = [
    (WrongSign, "right_on_quadratics"),
    (WrongSign, "right_on_logistic_regression"),
    (ForgetsToRestore, "nothing_moves"),
    (RestoresBySubtracting, "nothing_moves"),
    (LeavesTheDisplaced, "nothing_moves_when_a_loss_raises"),
    (LeavesAGradient, "nothing_moves"),
    (MovesBuffers, "nothing_moves"),
    (DrawsFromTheGlobalGenerator, "it_draws_from_no_global_generator"),
    (ForgetsTheMask, "common_random_numbers"),
    (ForgetsTheMask, "dropout_is_that_of_one_mask"),
    (Nonlinear, "linear_in_the_cotangent"),
    (AddsAConstant, "zero_in_zero_out"),
    (TouchesTheWarmStart, "zero_in_zero_out"),
    (IgnoresFrozen, "frozen_unused_and_tied_parameters"),
    (PullsBackTwice, "each_level_is_pulled_back_once"),
    (HidesWhatIsNotFinite, "a_loss_that_is_not_finite_raises"),
    (Boasts, "reports_are_consistent"),
    (ContradictsItself, "reports_are_consistent"),
    (GivesTooMuch, "only_what_is_wanted"),
    (PushesTheOtherWay, "pullback_and_pushforward_are_transposes"),
]


@pytest.mark.parametrize(("rule", "law"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_is_caught(rule: type[mlopt.Estimator], law: str) -> None:
    with pytest.raises(AssertionError):
        getattr(contract(rule), f"test_{law}")()


def test_without_a_fault_all_of_it_passes() -> None:
    """The estimator that the faulty ones are made of."""
    kept = contract(Faulty)
    laws = [name for name in dir(kept) if name.startswith("test_")]
    assert {f"test_{law}" for _, law in FAULTS} <= set(laws)
    for law in laws:
        getattr(kept, law)()


@pytest.mark.parametrize("law", ["right_on_quadratics", "right_on_logistic_regression"])
def test_a_claim_is_held_against_the_estimator(law: str) -> None:
    """Not exact, and farther off than its residual allows; or without one at all."""
    with pytest.raises(AssertionError, match=r"the residual that it reports, 0\.0e\+00, allows 0\.0e\+00"):
        getattr(contract(Boasts, exact=False), f"test_{law}")()
    with pytest.raises(AssertionError, match="reports no residual"):
        getattr(contract(mlopt.Identity, exact=False), f"test_{law}")()


def test_what_cannot_be_nested_must_be_refused() -> None:
    contract(Faulty, nested=False).test_right_when_nested()
    with pytest.raises(AssertionError, match="nested: it does not raise"):
        contract(mlopt.Dense, nested=False).test_right_when_nested()
    with pytest.raises(AssertionError, match="nested: off by"):
        contract(mlopt.Identity, nested=True).test_right_when_nested()


def test_importing_it_imports_no_test_runner() -> None:
    code = "import sys, mlopt.testing; print([n for n in ('pytest', 'hypothesis') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_it_says_what_to_define() -> None:
    with pytest.raises(NotImplementedError, match="define estimator"):
        EstimatorContract().test_right_on_quadratics()


def test_attrs_estimators_may_be_counted() -> None:
    """The counter in the contract passes everything else on."""
    from mlopt.testing.measuring import Counting

    rule = mlopt.Neumann(iterations=7)
    assert Counting(rule).iterations == rule.iterations
