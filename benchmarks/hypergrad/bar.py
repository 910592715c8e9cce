"""The targets of mlopt relative to the other libraries, and the figures that the rows show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from .workers import Part

__all__ = ["Check", "bar", "near"]

Row = dict[str, Any]
#: A check: the target, the figure, and True if the target is met; None if nothing was measured.
Check = tuple[str, str, bool | None]
#: A time whose ratio to its limit is this close to one is measured again.
NEAR = 0.05

EXACT = ("Dense", "Converged")
#: The estimators of one mixed product without a product with H, of which the best one counts.
ONE_PRODUCT = ("FiniteDifference", "Identity forward", "Identity compiled")
#: For each linear solver, the most time relative to the best equally accurate library: live products, compiled products.
MOST_TIME = {"ConjugateGradient": (0.9, 0.75), "Neumann": (1.0, 0.8)}
#: For each library that unrolls, the most memory relative to it.
MOST_MEMORY = {"torchopt": 0.2, "higher": 0.15}
#: A library is equally accurate if its error is at most this multiple of the least error of mlopt at the same iterations.
AS_RIGHT = 1.5


@dataclasses.dataclass(frozen=True)
class _Line:
    """A target with its figure.

    Attributes:
        target: in words.
        figure: None if it was not measured; NaN does not meet any target.
        limit: the largest figure that meets the target, the least one if `least`.
        least: see there.
        timed: for a ratio of times, the section and the part of it that measures it again.
    """

    target: str
    figure: float | None = None
    limit: float = math.nan
    least: bool = False
    timed: tuple[str, Part] | None = None

    @property
    def met(self) -> bool | None:
        if self.figure is None:
            return None
        return self.figure >= self.limit if self.least else self.figure <= self.limit

    @property
    def check(self) -> Check:
        return self.target, "not measured" if self.figure is None else f"{self.figure:.3g}", self.met

    @property
    def is_near(self) -> bool:
        return self.figure is not None and abs(self.figure / self.limit - 1) <= NEAR


def _family(row: Row) -> str:
    return str(row["estimator"]).split()[0]


def _is_compiled(row: Row) -> bool:
    return str(row["estimator"]).endswith(" compiled")


def _of(rows: Iterable[Row], section: str, *having: str) -> list[Row]:
    return [row for row in rows if row["section"] == section and all(key in row for key in having)]


def _ours(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["library"] == "mlopt"]


def _theirs(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["library"] not in ("mlopt", "exact")]


def bar(rows: list[Row]) -> list[Check]:
    """Return one check for each target."""
    return [line.check for line in _lines(rows)]


def near(rows: list[Row]) -> dict[str, tuple[str, Part]]:
    """Return the targets whose ratio of times is within 5% of its limit, each with the section and the part that measure it."""
    return {line.target: line.timed for line in _lines(rows) if line.timed is not None and line.is_near}


def _lines(rows: list[Row]) -> list[_Line]:
    groups: list[Callable[[list[Row]], list[_Line]]] = [_right, _same_iterations, _loop, _identity, _unroll, _ladder]
    return [line for group in groups for line in group(rows)]


def _worst(values: Iterable[float]) -> float | None:
    """Return the largest value; NaN if any value is NaN."""
    numbers = list(values)
    if any(math.isnan(value) for value in numbers):
        return math.nan
    return max(numbers, default=None)


def _right(rows: list[Row]) -> list[_Line]:
    exact = [row for row in _ours(_of(rows, "accuracy", "error")) if _family(row) in EXACT]
    graphs = [
        row for row in _ours(_of(rows, "multilevel", "error")) if row["estimator"] in ("Dense", "ConjugateGradient")
    ]
    double = [row["error"] for row in [*exact, *graphs] if row.get("dtype", "float64") == "float64"]
    single = [row["error"] for row in exact if row["dtype"] == "float32"]
    return [
        _Line("1 exact estimators: largest error in float64 <= 1e-8", _worst(double), 1e-8),
        _Line("1 exact estimators: largest error in float32 <= 1e-4", _worst(single), 1e-4),
    ]


def _same_iterations(rows: list[Row]) -> list[_Line]:
    lines = []
    measured = [row for row in _of(rows, "accuracy", "error", "time") if row["iterations"] == 10]
    for case in dict.fromkeys(row["case"] for row in measured if not row["case"].startswith("quadratic")):
        for family, limits in MOST_TIME.items():
            group = [row for row in measured if row["case"] == case and _family(row) == family]
            for kind, most_time in zip(("", " compiled"), limits, strict=True):
                compared = _theirs(group) + [row for row in _ours(group) if _is_compiled(row) == bool(kind)]
                part = "accuracy", Part(case, family, 10)
                lines += _costs(f"2 {family}{kind}, 10 iterations, {case}", compared, most_time, part)
    return lines


def _costs(name: str, group: list[Row], most_time: float, timed: tuple[str, Part]) -> list[_Line]:
    """Compare the fastest estimator of mlopt in a group with the best other library that is equally accurate."""
    ours = _ours(group)
    least = min((row["error"] for row in ours), default=math.inf)
    # On both sides: products with another matrix, or a wrong solver, are not comparable.
    ours, peers = ([row for row in side if row["error"] <= AS_RIGHT * least] for side in (ours, _theirs(group)))
    # The fastest estimator must meet both limits: time and memory come from the same estimator.
    fastest = sorted(ours, key=lambda row: row["time"])[:1]
    target = "{}: {} relative to the best equally accurate library <= {:g}"
    return [
        _Line(target.format(name, cost, most), _ratio(fastest, peers, cost), most, timed=again)
        for cost, most, again in (("time", most_time, timed), ("memory", 1.0, None))
    ]


def _ratio(ours: list[Row], peers: list[Row], cost: str) -> float | None:
    mine, other = ([row[cost] for row in group if cost in row] for group in (ours, peers))
    return min(mine) / min(other) if mine and other else None


def _loop(rows: list[Row]) -> list[_Line]:
    tracking = [row for row in _ours(_of(rows, "loop", "best peer / this")) if row["error"] <= 1e-2]
    target = "3 loop, {}: time per outer step, best other library / mlopt, both tracking to 1%, >= 3"
    lines = [
        _Line(
            target.format(name),
            max(row["best peer / this"] for row in tracking if row["case"] == name),
            3.0,
            least=True,
            timed=("loop", Part(name)),
        )
        for name in dict.fromkeys(row["case"] for row in tracking)
    ]
    return lines or [_Line(target.format("-"))]


def _identity(rows: list[Row]) -> list[_Line]:
    measured = _of(rows, "identity", "time", "error", "deviation")
    betty = next((row for row in measured if row["library"] == "betty" and _family(row) == "FiniteDifference"), None)
    candidates = [row for row in _ours(measured) if row["estimator"] in ONE_PRODUCT]
    if not candidates:
        return [_Line("4 identity")]
    # One estimator of mlopt must meet all four: take the one that misses the fewest limits, then the fastest.
    lines = [_identity_of(row, betty) for row in candidates]
    return min(zip(lines, candidates, strict=True), key=lambda p: (sum(not line.met for line in p[0]), p[1]["time"]))[0]


def _identity_of(row: Row, betty: Row | None) -> list[_Line]:
    name = f"4 {row['estimator']}"
    time = row["time"] / betty["time"] if betty else None
    deviation = row["deviation"] / betty["deviation"] if betty else None
    return [
        _Line(f"{name}: time relative to Betty's finite difference <= 0.95", time, 0.95, timed=("identity", Part())),
        _Line(f"{name}: error of the mixed product in float32 <= 1e-5", row["error"], 1e-5),
        _Line(f"{name}: deviation with dropout relative to Betty's <= 1/20", deviation, 1 / 20),
        _Line(f"{name}: error in bfloat16 <= 1%", row.get("bfloat16"), 0.01),
    ]


def _unroll(rows: list[Row]) -> list[_Line]:
    measured = _of(rows, "unroll", "time", "memory")
    lines = []
    for peer, most_memory in MOST_MEMORY.items():
        memory = time = None
        steps = {row["iterations"] for row in _ours(measured)} & {
            r["iterations"] for r in measured if r["library"] == peer
        }
        if steps:
            at = [row for row in measured if row["iterations"] == max(steps)]
            peers = [row for row in at if row["library"] == peer]
            memory, time = _ratio(_ours(at), peers, "memory"), _ratio(_ours(at), peers, "time")
        part = Part(iterations=max(steps, default=None))
        lines.append(_Line(f"5 unrolling: memory relative to {peer} <= {most_memory}", memory, most_memory))
        lines.append(_Line(f"5 unrolling: time relative to {peer} <= 1.3", time, 1.3, timed=("unroll", part)))
    return lines


def _ladder(rows: list[Row]) -> list[_Line]:
    top = [row for row in _ours(_of(rows, "ladder", "time / one rung")) if row["rungs"] == 8]
    worst = _worst(row["time / one rung"] for row in top)
    target = "6 ladder: time with 8 rungs relative to one rung, slowest estimator of mlopt, <= 10"
    return [_Line(target, worst, 10.0, timed=("ladder", Part()))]
