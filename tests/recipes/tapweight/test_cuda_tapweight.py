"""TapWeight on a GPU: weights and scores equal to the CPU's, and a run that is interrupted and resumed bit-equally."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from cuda_cases import CPU, DEVICE, deterministic, needs_cuda
from states import assert_same_state
from tapweight_cases import SETTINGS, Encoder, Reconstruct, recipe
from torch import Tensor

import mlopt
from mlopt.recipes import TapWeight
from mlopt.recipes.tapweight.methods import ThreeLevels

pytestmark = needs_cuda


class DrawnOnTheCPU(Reconstruct):
    """An objective whose masks are those of the CPU on every device."""

    def view(self, batch: Tensor) -> Tensor:
        return batch * torch.bernoulli(torch.full(batch.shape, 0.7)).to(batch)


def made(device: torch.device, kind: type[Reconstruct] = DrawnOnTheCPU, **arguments: Any) -> TapWeight:
    return recipe(lambda: Encoder().to(device), [kind("linear", 1.0), kind("square", 2.0)], **arguments)


@pytest.mark.parametrize(
    "estimator", [mlopt.Identity(), mlopt.ConjugateGradient(iterations=2), mlopt.FiniteDifference()], ids=str
)
def test_weights_and_scores_are_those_of_the_cpu(estimator: mlopt.Estimator) -> None:
    methods = ["direct", "equal", "rehearsal", "tapweight"]
    there, here = (
        made(device, estimator=estimator).fit(8, methods=methods, progress=False) for device in (DEVICE, CPU)
    )
    assert list(there.scores) == methods
    assert there.outcomes["rehearsal"].weights == pytest.approx(here.outcomes["rehearsal"].weights, abs=1e-2)
    assert there.encoder.layer.weight.device.type == DEVICE.type
    assert there.weights == pytest.approx(here.weights, rel=1e-5)
    for method, scores in there.scores.items():
        assert scores == pytest.approx(here.scores[method], rel=1e-5), method
    for name, signal in there.signals.items():
        assert signal.mean == pytest.approx(here.signals[name].mean, rel=1e-3, abs=1e-5)
    torch.testing.assert_close(there.encoder.layer.weight.cpu(), here.encoder.layer.weight, rtol=1e-5, atol=1e-6)
    assert len(set(here.weights.values())) == 2  # the weights have moved


class Interrupted(mlopt.Callback):
    """End the run before one of its steps, as an interruption does."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, run: Any) -> None:
        if run.step == self._step:
            raise KeyboardInterrupt


def test_an_interrupted_run_resumes_bit_equally(tmp_path: Path) -> None:
    """The interruption falls between two measurements of the signals; the masks come from the generator of the device."""

    def adapt(folder: Path, *, resume: bool = False, end: int = -1) -> Any:
        settings = attrs.evolve(SETTINGS, measurements=2)
        with deterministic():
            experiment = made(DEVICE, Reconstruct, settings=settings).experiment(
                12, checkpoint=mlopt.Checkpoints(folder, every=1), resume=resume, progress=False
            )
            adapted = ThreeLevels().adapt(experiment, [Interrupted(end)])
        signals = {name: attrs.asdict(signal) for name, signal in adapted.signals.items()}
        weight = adapted.encoder.layer.weight.detach().cpu()
        return {"weights": adapted.weights, "signals": signals, "encoder": weight, "history": list(adapted.history)}

    whole = adapt(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        adapt(tmp_path / "cut", end=8)
    assert_same_state(adapt(tmp_path / "cut", resume=True), whole)


def test_preparing_moves_no_generator_of_the_device() -> None:
    """The gradients' norms are measured with seeds of their own."""

    def drawn() -> Tensor:
        own = made(DEVICE, Reconstruct)
        torch.manual_seed(3)
        own.prepare()
        return torch.rand(2, device=DEVICE)

    assert torch.equal(drawn(), drawn())
