"""The result of a run: scores, weights and their significance, history, adapted encoder and predictor; saved, and drawn."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
from rich.table import Table

from mlopt.errors import ArgumentError
from mlopt.solving import write_csv

from .predictor import MODEL
from .significance import Signal, verdict

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from mlopt.solving import History

    from .encoder import Encoder
    from .finetuning import Finetuned
    from .predictions import Predictions
    from .predictor import Predictor
    from .task import Split
    from .tested import Tested

__all__ = ["Outcome", "TapWeightResult"]

#: The columns of a history that hold the weights at each step, but for the name of the objective.
_PATH = "reweighting/weight/"
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


@attrs.frozen(kw_only=True)
class Outcome:
    """The outcome of one method.

    Attributes:
        title: the name of the method in tables.
        summary: a sentence on how the method adapted the encoder.
        passes: its cost, see `Method.passes`.
        weights: the weight of each objective, if the method weighs them.
        scores: the metric on "valid" and "test"; means over the finetunings.
        measures: every metric on "test" that is defined, by task and by name; means over the finetunings.
    """

    title: str
    summary: str
    passes: int
    weights: Mapping[str, float] | None
    scores: dict[str, float]
    measures: dict[str, dict[str, float]] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True, eq=False)
class TapWeightResult:
    """The result of a run.

    Attributes:
        outcomes: the outcome of each method by its name. The last is that of the main method, whose encoder this result holds.
        signals: how each objective compares with the average of all, and the significance; empty if the main method does not
            measure it.
        history: of the main method; for TapWeight the losses of the three levels, and the weights, at each step on the weights.
        encoder: the adapted encoder of the main method, before the final finetuning.
        finetuned: the finetuned models of the main method, one for each finetuning, and as many as the ensemble has.
        predictor: the ensemble of the first of these models; None if the task defines no predictor.
        tested: the predictions of the predictor for the test split; None without a predictor.
        splits: the 0-based numbers of the records of each split, see `Examples`; None unless all splits are parts of one file.
        metric: the metric's name.
        greater_is_better: True if a larger metric is better.
        settings: the numbers of the run, see `Settings`.
        steps: pretraining steps.
        seed: the seed of everything random.
        estimator: how the finetuning level was pulled back, as it prints.
        data: descriptions of the "task" and the "corpus".
    """

    outcomes: dict[str, Outcome]
    signals: dict[str, Signal]
    history: History
    encoder: Encoder
    finetuned: tuple[Finetuned, ...]
    metric: str
    greater_is_better: bool
    settings: dict[str, Any]
    steps: int
    seed: int
    estimator: str
    data: dict[str, str] = attrs.field(factory=dict)
    predictor: Predictor | None = None
    tested: Tested | None = None
    splits: dict[Split, list[int]] | None = None

    @property
    def main(self) -> Outcome:
        """The outcome of the main method."""
        return [*self.outcomes.values()][-1]

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each objective; they sum to one. Empty if the main method does not weigh objectives."""
        return dict(self.main.weights or {})

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """The metric on "valid" and "test", by method."""
        return {name: outcome.scores for name, outcome in self.outcomes.items()}

    @property
    def verdict(self) -> str:
        """A sentence on the significant weights."""
        return verdict(self.signals)

    def predict(self, contents: Sequence[Any]) -> Predictions:
        """Predict the labels of new examples, such as a list of SMILES; see `Predictor.predict`.

        Raises:
            ArgumentError: the task defines no predictor.
        """
        return self._own_predictor().predict(contents)

    def embed(self, contents: Sequence[Any]) -> NDArray[np.float64]:
        """Return the features (N, width) of new examples, of the finetuned encoder; see `Predictor.embed`.

        Raises:
            ArgumentError: the task defines no predictor.
        """
        return self._own_predictor().embed(contents)

    def _own_predictor(self) -> Predictor:
        if self.predictor is None:
            raise ArgumentError(
                "the task of this run defines no predictor; override Task.predictor, or use `finetuned`"
            )
        return self.predictor

    def tables(self) -> list[Table]:
        """Return the weights of the main method, if it has any, and the scores of all methods as tables to print."""
        tables = []
        if self.weights:
            tables.append(Table(title=f"Weights of {self.main.title}"))
            for column in ("objective", "weight", "equal share", "signal / error", "significant"):
                tables[0].add_column(column, justify="left" if column == "objective" else "right")
        for name, weight in sorted(self.weights.items(), key=lambda item: -item[1]):
            cells = self.signals[name].cells if self.signals else ("", "")
            tables[0].add_row(name, f"{weight:.3f}", f"{1 / len(self.weights):.3f}", *cells)
        scores = Table(title=f"{self.metric} ({'higher' if self.greater_is_better else 'lower'} is better)")
        for column in ("method", "validation", "test", "encoder passes"):
            scores.add_column(column, justify="left" if column == "method" else "right")
        for outcome in self.outcomes.values():
            valid, test = (f"{outcome.scores[split]:.3f}" for split in ("valid", "test"))
            scores.add_row(outcome.title, valid, test, f"{outcome.passes:,}")
        if (
            self.predictor is not None
            and len(self.predictor.members) > 1
            and self.tested is not None
            and self.tested.scores
        ):
            title = f"{self.main.title}, mean of {len(self.predictor.members)} models"
            scores.add_row(title, "", f"{self.tested.score:.3f}", "")
        return [*tables, scores]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the run to a folder.

        The files are the weights, the history, the scores, the picture, the configuration and the environment; `encoder`, the
        adapted encoder with its card; `model`, the predictor; its predictions for the test split; and the records of the splits.

        Args:
            folder: made if it is missing.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        signals = {name: attrs.asdict(signal) for name, signal in self.signals.items()}
        _write_json(folder / "weights.json", {"weights": self.weights, "signals": signals, "verdict": self.verdict})
        measures = {name: outcome.measures for name, outcome in self.outcomes.items()}
        scores = {"metric": self.metric, "scores": self.scores, "test_measures": measures, **self._label_scores()}
        _write_json(folder / "scores.json", scores)
        configuration = {"steps": self.steps, "seeds": [self.seed], "settings": self.settings}
        _write_json(folder / "config.json", configuration)
        _write_json(folder / "environment.json", environment() | {"estimator": self.estimator})
        write_csv(self.history, folder / "history.csv")
        if self.signals:
            self.plot(folder / "weights.png")
        self.encoder.save(folder / "encoder")
        (folder / "encoder" / "README.md").write_text(_card(self), encoding="utf-8")
        if self.splits is not None:
            _write_json(folder / "splits.json", self.splits)
        if self.predictor is not None and self.tested is not None:
            self.predictor.save(folder / MODEL)
            self.tested.write(folder / "predictions.csv")

    def _label_scores(self) -> dict[str, Any]:
        """Return the scores of the predictor on the test split, by label; empty without a predictor."""
        if self.predictor is None or self.tested is None:
            return {}
        return {"predictor": {"models": len(self.predictor.members), "test": self.tested.scores}}

    def plot(self, file: str | os.PathLike[str]) -> None:
        """Draw the weights, over the steps if the history has them, and the signals with their errors.

        Args:
            file: the suffix names the format.

        Raises:
            ValueError: the main method did not measure how the objectives compare.
        """
        if not self.signals:
            raise ArgumentError(
                f"plot: {self.main.title} did not measure how the objectives compare; give 'rehearsal' or 'tapweight' as the "
                "last method"
            )
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(4, 3))
        order = sorted(self.weights, key=lambda name: -self.weights[name])
        colours = {name: f"C{k}" for k, name in enumerate(self.weights)}
        if any(name.startswith(_PATH) for name in self.history.names):
            self._draw_paths(left, order, colours)
        else:
            self._draw_bars(left, order, colours)
        left.legend(frameon=False, fontsize="small")
        rows = list(reversed(order))
        for row, name in enumerate(rows):
            signal = self.signals[name]
            error = 2 * signal.error if math.isfinite(signal.error) else 0.0
            face = colours[name] if signal.significant else "white"
            right.errorbar(signal.mean, row, xerr=error, fmt="o", color=colours[name], markerfacecolor=face, capsize=3)
        right.axvline(0, color="grey", linewidth=0.8)
        right.set_yticks(range(len(rows)), rows)
        right.set(xlabel="signal, two standard errors (filled: significant)", title="Benefit over the average")
        figure.savefig(file, dpi=150)

    def _draw_paths(self, axes: Any, order: Sequence[str], colours: Mapping[str, str]) -> None:
        """Draw the weights over the pretraining steps."""
        steps = [step * self.settings["every"] for step in self.history.column("step")]
        for name in order:
            style = "-" if self.signals[name].significant else "--"
            path = self.history.column(f"{_PATH}{name}")
            axes.plot(steps, path, style, color=colours[name], label=f"{name}  {self.weights[name]:.3f}")
        axes.axhline(1 / len(order), color="grey", linewidth=0.8, linestyle=":", label="equal share")
        title = "Weights of the objectives (dashed: not significant)"
        axes.set(xlabel="pretraining step", ylabel="weight", title=title)
        axes.set_ylim(bottom=0)

    def _draw_bars(self, axes: Any, order: Sequence[str], colours: Mapping[str, str]) -> None:
        """Draw the weights as bars with their standard errors, the largest at the top."""
        rows = range(len(order))
        values = [self.weights[name] for name in order]
        errors = [self.signals[name].weight_error or 0.0 for name in order]
        # A weight is a share: its error bar ends at 0 and at 1.
        ends = [
            [min(error, room) for error, room in zip(errors, rooms, strict=True)]
            for rooms in (values, [1 - value for value in values])
        ]
        bars = axes.barh(
            rows,
            values,
            xerr=ends if any(errors) else None,
            color=[colours[name] for name in order],
            error_kw={"ecolor": "0.4", "capsize": 3},
        )
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
        axes.axvline(1 / len(order), color="grey", linewidth=0.8, linestyle=":", label="equal share")
        axes.set_yticks(rows, order)
        axes.invert_yaxis()
        axes.set(
            xlabel="share of resamples of the labels in which it was best, with standard error",
            title=f"{self.main.title}: weights",
        )
        axes.set_xlim(0, 1.1)


def _card(result: TapWeightResult) -> str:
    """Return a model card in Markdown, headed by the entries of the encoder's attribute `card`."""
    front = {**result.encoder.card, "tags": ["tapweight", "task-adaptive-pretraining"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# Encoder adapted by {result.main.title}", ""]
    lines += [f"{result.main.summary} Steps: {result.steps}. This is the encoder before finetuning.", ""]
    lines += ["## Data", "", *(f"- {name}: {value}" for name, value in result.data.items()), ""]
    if result.weights:
        lines += ["## Weights", "", result.verdict, "", "| objective | weight | signal / error | significant |"]
        lines += ["|---|---|---|---|"]
    for name, weight in sorted(result.weights.items(), key=lambda item: -item[1]):
        cells = result.signals[name].cells if result.signals else ("", "")
        lines.append(f"| {name} | {weight:.3f} | {' | '.join(cells)} |")
    better = "higher" if result.greater_is_better else "lower"
    lines += ["", f"## Scores: {result.metric}, {better} is better", ""]
    lines += ["| method | validation | test | encoder passes |", "|---|---|---|---|"]
    for outcome in result.outcomes.values():
        scores = outcome.scores
        lines.append(f"| {outcome.title} | {scores['valid']:.3f} | {scores['test']:.3f} | {outcome.passes} |")
    lines += [
        "",
        "The encoder of each method was finetuned with the same budget; the epoch was chosen on validation.",
        "",
    ]
    settings = {"seed": result.seed, "estimator": result.estimator, **result.settings}
    lines += ["## Settings", "", *(f"- {name}: {value}" for name, value in settings.items()), ""]
    return "\n".join(lines)


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
