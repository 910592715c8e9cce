"""The measurement of torch's derivatives, and the table of the documentation that it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import mlopt
from mlopt import cli
from mlopt.diagnosis.derivatives import ROUTES, Measurement, main, measure
from mlopt.diagnosis.functions import Case, cases

PAGE = Path(__file__).parents[2] / "docs" / "estimators.md"
CASES = {case.name: case for case in cases()}
#: Functions that torch differentiates wrongly, and mlopt correctly.
MENDED = [
    "LayerNorm",
    "BatchNorm1d, train",
    "BatchNorm1d without running statistics, eval",
    "BatchNorm2d, train",
    "InstanceNorm1d",
    "InstanceNorm1d with running statistics, train",
    "InstanceNorm2d",
    "utils.weight_norm",
    "weight_norm, dim=0",
    "weight_norm, last dim",
    "TransformerEncoderLayer, train",
]
#: Functions that both torch and mlopt differentiate wrongly; the page names the remedy.
LEFT = ["spectral_norm, train", "scatter_reduce, prod"]


def rows() -> dict[str, list[str]]:
    """Return the verdicts of the page, by function."""
    section = PAGE.read_text().split("## What torch differentiates wrongly")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    assert lines[0] == ["function", *ROUTES]
    return {name: verdicts for name, *verdicts in lines[1:]}


def verdicts(measured: Measurement) -> list[str]:
    return [measured.verdict(route) for route in ROUTES]


@pytest.mark.parametrize("name", [*MENDED, *LEFT, "Hardsigmoid", "logcumsumexp"])
def test_the_page_agrees_with_the_measurement(name: str) -> None:
    for written, measured in zip(rows()[name], verdicts(measure(CASES[name])), strict=True):
        if "%" in written:
            assert float(measured.strip("%")) == pytest.approx(float(written.strip("%")), rel=0.1)
        else:
            assert measured == written


def test_the_page_lists_every_function_that_is_wrong() -> None:
    wrong = [name for name, written in rows().items() if any("%" in verdict for verdict in written)]
    assert sorted(wrong) == sorted([*MENDED, *LEFT, "TransformerEncoderLayer, eval"])


@pytest.mark.parametrize("name", MENDED)
def test_primitive_forms_are_right(name: str) -> None:
    assert verdicts(measure(CASES[name], primitives=True)) == ["right"] * len(ROUTES)


@pytest.mark.parametrize(
    "name", ["RMSNorm", "GroupNorm", "BatchNorm1d, eval", "MultiheadAttention", "GELU", "cross_entropy"]
)
def test_the_page_lists_functions_that_are_right(name: str) -> None:
    assert verdicts(measure(CASES[name])) == ["right"] * len(ROUTES)
    assert name not in rows()
    assert name in PAGE.read_text()


class _Halved(torch.autograd.Function):
    """A cube whose first derivative is right, and whose second is half the true one."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, weight: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * weight * x * x.detach()


def test_a_wrong_derivative_is_measured() -> None:
    def make() -> tuple[object, tuple[Tensor, ...]]:
        return _Halved.apply, (torch.randn(4, dtype=torch.float64),)

    measured = measure(Case("halved", "other", make))
    assert measured.verdict("R") == "right"
    assert measured.errors["RR"] > 0.01
    assert measured.errors["RRR"] > 0.01
    assert not measured.right


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["derivatives", "layernorm", "rmsnorm"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert f"| LayerNorm | {' | '.join(rows()['LayerNorm'])} |" in printed
    assert "- norm: RMSNorm." in printed


def test_a_name_that_no_function_has() -> None:
    with pytest.raises(mlopt.ArgumentError, match="'nonesuch'"):
        main(["nonesuch"])
