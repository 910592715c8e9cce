"""Differentiation through steps of gradient descent: time and peak memory by number of steps.

A network of 1.01M parameters (784-1024-200-10, 128 samples, float32) with SGD. Time and memory are relative to one plain gradient
of the inner loss. The error compares 10 steps with the same unroll in float64.

The libraries do not take turns here: each is measured alone, in a process that ends with its last measurement. A process keeps
several times the peak of its calls, 1 to 3 GB after 100 steps, and all of them together would fill the memory of the machine.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cases, exact
from ..adapters import family
from ..workers import Library, Workplace

CASE = "MLP of 1M"


def run(place: Workplace) -> list[dict[str, Any]]:
    """Return a row for each unrolling estimator and number of steps."""
    file, steps = place.case(CASE), (10, 30) if place.quick else (10, 20, 50, 100)
    case = cases.load(file)
    truth = exact.unrolled(case, steps[0], case.step_size)
    rows: list[dict[str, Any]] = []
    if place["mlopt"] is not None and "Unrolled" not in place["mlopt"].about["estimators"]:
        rows.append(
            {"library": "mlopt", "estimator": "Unrolled", "case": CASE, "note": "this version of mlopt has none"}
        )
    for library in place.libraries:
        for name in library.about["estimators"]:
            if family(name) == "Unrolled":
                with library.another() as alone:
                    alone.result("load", file=file)
                    rows += _measured(place, alone, name, steps, truth)
    return rows


def _measured(
    place: Workplace, library: Library, name: str, steps: tuple[int, ...], truth: Tensor
) -> list[dict[str, Any]]:
    """Return the rows of one estimator; times are medians of rounds in which the numbers of steps take turns."""
    plain = library.result("memory", key="plain")
    rows, timed = [], []
    for count in steps:
        if not place.wants(CASE, name, count):
            continue
        row: dict[str, Any] = {"library": library.name, "estimator": name, "case": CASE, "iterations": count}
        rows.append(row)
        key = f"{name}, {count}"
        answer = library.ask("build", key=key, estimator=name, iterations=count)
        if "result" in answer:
            answer = library.ask("memory", key=key)
        if "result" not in answer:
            row["note"] = answer.get("unsupported") or f"failed: {answer['failed']}"
            continue
        row["memory"] = answer["result"] / plain
        if count == steps[0]:
            gradient = torch.tensor(library.result("repeats_of", key=key, count=1)[0], dtype=torch.float64)
            row["error"] = float((gradient - truth).norm() / truth.norm())
        timed.append((key, row))
    ratios = place.ratios([(library, key) for key, _ in timed], 2 if place.quick else 5)
    for (_, row), ratio in zip(timed, ratios, strict=True):
        row["time"] = ratio
    return rows
