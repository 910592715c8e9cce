"""What a TapWeight run gives: weights and what they are worth, history, the adapted encoder, scores; saved, and drawn."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from rich.table import Table
from safetensors.torch import save_model

from mlopt.solving import write_csv

from .card import card
from .signals import Signal, verdict

if TYPE_CHECKING:
    import os

    from torch import nn

    from mlopt.solving import History

__all__ = ["WAYS", "TapWeightResult"]

WAYS = {"direct": "direct finetuning", "equal": "equal weights", "tapweight": "TapWeight"}
_PACKAGES = (
    "mlopt-torch",
    "torch",
    "torch-geometric",
    "transformers",
    "rdkit",
    "scikit-learn",
    "torchmetrics",
    "numpy",
)


@attrs.frozen(kw_only=True, eq=False)
class TapWeightResult:
    """What a run gives.

    Attributes:
        weights: the learned weight of each objective; they sum to one.
        signals: for each objective, how it compares with the mixture, and whether that is significant.
        history: losses of the three levels, and the weights, at each step on the weights.
        encoder: the adapted encoder, before the final finetuning.
        scores: by way ("direct", "equal", "tapweight") the metric on "valid" and "test".
        metric: the metric's name.
        greater_is_better: whether a larger metric is a better one.
        settings: the numbers of the run, see `Settings`.
        steps: pretraining steps.
        seed: of everything random.
        estimator: how the finetuning level was pulled back, as it prints.
        data: in words, what the "task" and the "corpus" were.
    """

    weights: dict[str, float]
    signals: dict[str, Signal]
    history: History
    encoder: nn.Module
    scores: dict[str, dict[str, float]]
    metric: str
    greater_is_better: bool
    settings: dict[str, Any]
    steps: int
    seed: int
    estimator: str
    data: dict[str, str] = attrs.field(factory=dict)

    @property
    def verdict(self) -> str:
        """In words, which weights mean something."""
        return verdict(self.signals)

    def tables(self) -> tuple[Table, Table]:
        """Return the weights and the scores as tables to print."""
        weights = Table(title="Learned weights")
        for column in ("objective", "weight", "equal share", "signal / error", "significant"):
            weights.add_column(column, justify="left" if column == "objective" else "right")
        for name, weight in sorted(self.weights.items(), key=lambda item: -item[1]):
            signal = self.signals[name]
            mark = ("helps" if signal.mean > 0 else "harms") if signal.significant else "no"
            weights.add_row(name, f"{weight:.3f}", f"{1 / len(self.weights):.3f}", f"{signal.z:+.1f}", mark)
        scores = Table(title=f"{self.metric} ({'higher' if self.greater_is_better else 'lower'} is better)")
        for column in ("way", "validation", "test"):
            scores.add_column(column, justify="left" if column == "way" else "right")
        for way, score in self.scores.items():
            scores.add_row(WAYS[way], f"{score['valid']:.3f}", f"{score['test']:.3f}")
        return weights, scores

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the run to a folder: weights, history, scores, picture, encoder, configuration and environment.

        The encoder writes itself where it has a method `save(folder)`; else its tensors go to `encoder/model.safetensors`. A
        card, `encoder/README.md`, tells what it was made from.

        Args:
            folder: made where it does not exist.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        signals = {name: attrs.asdict(signal) for name, signal in self.signals.items()}
        _write_json(folder / "weights.json", {"weights": self.weights, "signals": signals, "verdict": self.verdict})
        _write_json(folder / "scores.json", {"metric": self.metric, "scores": self.scores})
        configuration = {"steps": self.steps, "seeds": [self.seed], "settings": self.settings}
        _write_json(folder / "config.json", configuration)
        _write_json(folder / "environment.json", environment() | {"estimator": self.estimator})
        write_csv(self.history, folder / "history.csv")
        self.plot(folder / "weights.png")
        if hasattr(self.encoder, "save"):
            self.encoder.save(folder / "encoder")  # type: ignore[operator]
        else:
            (folder / "encoder").mkdir(exist_ok=True)
            save_model(self.encoder, str(folder / "encoder" / "model.safetensors"))
        (folder / "encoder" / "README.md").write_text(card(self, WAYS), encoding="utf-8")

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw the weights over the steps, and the signals with their errors.

        Args:
            file: where to write it; the suffix names the format.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        order = sorted(self.weights, key=lambda name: -self.weights[name])
        steps = [step * self.settings["every"] for step in self.history.column("step")]
        colours = {name: f"C{k}" for k, name in enumerate(self.weights)}
        for name in order:
            style = "-" if self.signals[name].significant else "--"
            path = self.history.column(f"reweighting/weight/{name}")
            left.plot(steps, path, style, color=colours[name], label=f"{name}  {self.weights[name]:.3f}")
        left.axhline(1 / len(order), color="grey", linewidth=0.8, linestyle=":", label="equal share")
        left.set(
            xlabel="pretraining step", ylabel="weight", title="Weights of the objectives (dashed: not significant)"
        )
        left.set_ylim(bottom=0)
        left.legend(frameon=False, fontsize="small")
        rows = list(reversed(order))
        means = [self.signals[name].mean for name in rows]
        errors = [2 * self.signals[name].error if len(self.history) else 0.0 for name in rows]
        for row, (name, mean, error) in enumerate(zip(rows, means, errors, strict=True)):
            face = colours[name] if self.signals[name].significant else "white"
            right.errorbar(mean, row, xerr=error, fmt="o", color=colours[name], markerfacecolor=face, capsize=3)
        right.axvline(0, color="grey", linewidth=0.8)
        right.set_yticks(range(len(rows)), rows)
        right.set(
            xlabel="signal, with two standard errors",
            title="Does more of it help? (filled: significant)",
        )
        figure.savefig(file, dpi=150)


def environment() -> dict[str, Any]:
    """Return the versions of Python and of the packages that a run depends on."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, indent=2, allow_nan=True) + "\n")
