"""Ablations: variants of a method against it, on development seeds and, for a confirmation, on fresh ones."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import attrs

from .comparison import holm, paired_t
from .results import Regime, regimes
from .rows import Row
from .tables import table

__all__ = ["ABLATIONS", "DEVELOPMENT", "FRESH", "Ablation", "Gain", "gains", "report"]

#: The seeds that choose among variants, and those that confirm the choice; the study's own are others.
DEVELOPMENT, FRESH = tuple(range(10)), tuple(range(20, 30))
_SETS = {"development": DEVELOPMENT, "fresh": FRESH}


@attrs.frozen
class Ablation:
    """A method and its variants.

    Attributes:
        reference: the method.
        variants: the variants, see `variants.method_of`.
        question: a sentence on what is asked.
    """

    reference: str
    variants: tuple[str, ...]
    question: str


ABLATIONS = {
    "rehearsal": Ablation(
        "rehearsal",
        (
            "rehearsal-halving",
            "rehearsal-mixtures",
            "rehearsal-sequential",
            "rehearsal-gradient",
            "rehearsal-sum",
            "rehearsal-verdict",
        ),
        "Does an option of the rehearsals pay?",
    ),
    "length": Ablation(
        "rehearsal",
        ("rehearsal:rehearsals=1", "rehearsal:rehearsal_steps=300,rehearsals=1", "rehearsal:rehearsal_steps=50"),
        "How long and how often is an objective to be rehearsed?",
    ),
    "estimators": Ablation(
        "tapweight",
        ("tapweight-differences", "tapweight-neumann", "tapweight-cg"),
        "Does a better inverse Hessian than the identity help the published form?",
    ),
    "coupling": Ablation(
        "tapweight",
        # Without a coupling no derivative reaches the weights: they stay equal.
        ("tapweight-l1", "equal"),
        "L2, L1 or no coupling of the two encoders?",
    ),
    "gamma": Ablation(
        "tapweight",
        ("tapweight:gamma=0.01", "tapweight:gamma=1", "tapweight:gamma=10", "tapweight:gamma=1000"),
        "How strong is the coupling to be?",
    ),
    "unroll": Ablation(
        "tapweight",
        ("tapweight:every=2", "tapweight:every=4", "tapweight:every=8"),
        "How many pretraining steps for each step on the weights?",
    ),
    "frozen": Ablation("tapweight", ("frozen",), "Do the learned weights help a run from the start?"),
    "scale": Ablation(
        "equal", ("equal:scale=none",), "Equal pull of the objectives, or equal weights of the losses as they are?"
    ),
}


@attrs.frozen
class Gain:
    """A variant against the reference, over tasks and seeds.

    Attributes:
        tasks: for each task the mean gain in its metric, positive if the variant is better, and the seeds in which it is.
        mean: the mean over seeds and tasks of the gain in units of the reference's standard deviation over seeds on the task.
        seeds: the seeds with a row of both on every task.
        p: of the paired t test over seeds, of the mean over tasks.
        adjusted: p after Holm's correction over the variants.
    """

    tasks: dict[str, tuple[float, int]]
    mean: float
    seeds: int
    p: float
    adjusted: float

    @property
    def pays(self) -> bool:
        """True if the variant is significantly better at 5%."""
        return self.mean > 0 and self.adjusted < 0.05


def gains(regime: Regime, reference: str, variants: Sequence[str], seeds: Sequence[int]) -> dict[str, Gain]:
    """Return the gain of each variant that has rows with at least two of the seeds on every task of the reference."""
    tasks = [task for task in regime.tasks if regime.scores(reference, task)]
    compared: dict[str, tuple[dict[str, tuple[float, int]], list[float]]] = {}
    for variant in variants:
        common = [
            seed
            for seed in seeds
            if all(seed in regime.scores(method, task) for method in (reference, variant) for task in tasks)
        ]
        if len(common) < 2:
            continue
        by_task, scaled = {}, []
        for task in tasks:
            sign = 1 if regime.better[task] else -1
            own, other = ([regime.scores(method, task)[seed] for seed in common] for method in (variant, reference))
            differences = [sign * (x - y) for x, y in zip(own, other, strict=True)]
            by_task[task] = statistics.fmean(differences), sum(difference > 0 for difference in differences)
            deviation = statistics.stdev(other) or 1.0
            scaled.append([difference / deviation for difference in differences])
        compared[variant] = by_task, [statistics.fmean(of_seed) for of_seed in zip(*scaled, strict=True)]
    values = [paired_t(of_seeds) for _, of_seeds in compared.values()]
    return {
        variant: Gain(by_task, statistics.fmean(of_seeds), len(of_seeds), p, adjusted)
        for (variant, (by_task, of_seeds)), p, adjusted in zip(compared.items(), values, holm(values), strict=True)
    }


def report(rows: Sequence[Row], ablation: Ablation) -> str:
    """Return the tables of an ablation as Markdown: development and fresh seeds apart, and which variants pay on both."""
    names = (ablation.reference, *ablation.variants)
    parts = [ablation.question]
    for regime in regimes([row for row in rows if row["method"] in names]):
        parts += [f"## {regime.title}", f"{regime.subtitle}."]
        by_set = {name: gains(regime, ablation.reference, ablation.variants, seeds) for name, seeds in _SETS.items()}
        parts += [_table(regime, name, own, ablation.reference) for name, own in by_set.items() if own]
        development, fresh = by_set.values()
        stay = [
            name for name in ablation.variants if all(name in own and own[name].pays for own in (development, fresh))
        ]
        parts.append(f"Significantly better on development and on fresh seeds: {', '.join(stay) or 'none'}.")
    return "\n\n".join(parts)


def _table(regime: Regime, name: str, own: dict[str, Gain], reference: str) -> str:
    tasks = list(next(iter(own.values())).tasks)
    body = [
        [
            regime.titles[variant],
            *(f"{gain.tasks[task][0]:+.3f}; {gain.tasks[task][1]} of {gain.seeds}" for task in tasks),
            f"{gain.mean:+.2f}",
            f"{gain.p:.3f}",
            f"{gain.adjusted:.3f}",
        ]
        for variant, gain in own.items()
    ]
    note = (
        f"Gain over {regime.titles[reference]}, {name} seeds: the mean in the metric, positive if better, and the seeds in "
        "which it is better. The mean over the tasks is in standard deviations of the reference over the seeds, with the p of "
        "its paired t test, and p after Holm's correction over the variants."
    )
    return f"{note}\n\n{table(['variant', *tasks, 'mean', 'p', 'adjusted'], body)}"
