"""Ladders of 1 to 8 diamonds; n diamonds have 2^n paths. Time of a hypergradient relative to one rung."""

from __future__ import annotations

from typing import Any

from ..workers import Library, Workplace

SIZE = 5
#: A library stops climbing after a call that took more seconds than this.
BEARABLE = 2.0


def run(place: Workplace) -> list[dict[str, Any]]:
    """Return a row for each library, estimator and number of rungs."""
    rows = []
    for library in place.libraries:
        # The head of the repository has the same finite difference as the release.
        for estimator in library.about["graphs"] if library.name != "betty_head" else ():
            if library.name == "mlopt" or estimator == "FiniteDifference":
                rows += _climb(library, estimator, 0.5 if place.quick else BEARABLE)
    return rows


def _climb(library: Library, estimator: str, bearable: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for rungs in range(1, 9):
        row: dict[str, Any] = {"library": library.name, "estimator": estimator, "case": "ladder", "rungs": rungs}
        rows.append(row)
        answer = library.ask(
            "graph", key="call", shape=f"ladder {rungs}", size=SIZE, estimator=estimator, iterations=50
        )
        if "result" in answer:
            answer = library.ask("graph_error", key="call")
        if "result" not in answer:
            row["note"] = answer.get("unsupported") or f"failed: {answer['failed']}"
            break
        seconds = [library.result("time", key="call")]
        if seconds[0] < bearable:
            seconds += [library.result("time", key="call") for _ in range(4)]
        row |= {"seconds": min(seconds), "error": answer["result"]["error"]}
        row["time / one rung"] = row["seconds"] / rows[0]["seconds"]
        if min(seconds) > bearable:
            row["note"] = "stopped here: the next takes too long"
            break
    return rows
