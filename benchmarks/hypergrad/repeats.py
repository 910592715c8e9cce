"""Two more runs of the targets whose ratio of times is within 5% of its limit: one run decides nothing there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from .bar import bar, near
from .workers import Part, Workplace

__all__ = ["RUNS", "repeat", "runs_of"]

Row = dict[str, Any]
#: The runs of such a target, with the first one.
RUNS = 3


def repeat(
    rows: list[Row],
    sections: Mapping[str, Callable[[Workplace], list[Row]]],
    workplace: Callable[[Collection[Part]], Workplace],
) -> list[Row]:
    """Measure the parts of the sections again on which the targets near their limit depend; return the rows.

    Args:
        rows: of the first run.
        sections: by name.
        workplace: returns one for these parts of a section.
    """
    parts: dict[str, set[Part]] = {}
    for section, part in near(rows).values():
        parts.setdefault(section, set()).add(part)
    repeated = []
    for number in range(2, RUNS + 1):
        for section, chosen in parts.items():
            with workplace(chosen) as place:
                repeated += [
                    {"section": "repeat", "of": section, "run": number} | row for row in sections[section](place)
                ]
    return repeated


def runs_of(rows: Sequence[Row]) -> list[tuple[str, list[str], str]]:
    """Return each target that was repeated, its figure in each run, and the number of runs that meet it."""
    runs = [[row for row in rows if row["section"] != "repeat"]]
    for number in range(2, RUNS + 1):
        again = [row for row in rows if row["section"] == "repeat" and row["run"] == number]
        runs.append([row | {"section": row["of"]} for row in again])
    if not runs[-1]:
        return []
    checks = [{target: (figure, met) for target, figure, met in bar(run)} for run in runs]
    lines = []
    for target in near(runs[0]):
        seen = [check.get(target, ("not measured", None)) for check in checks]
        lines.append(
            (target, [figure for figure, _ in seen], f"met in {sum(met is True for _, met in seen)} of {RUNS}")
        )
    return lines
