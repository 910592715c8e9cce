"""Hyper-cleaning in practice: each outer step is one inner gradient step, one hypergradient and one Adam step.

The inner step is full-batch gradient descent of step size 1 / (1.05 lambda_max), outer learning rate 1e-2; n = 1000, float32.
Softmax regression is the problem of the literature (there with 784 features) and badly conditioned; the network, MLP 64-256-10,
is well conditioned because of its proximal term. At every tenth outer step the hypergradient of that step is compared with the
exact one at the same point (conjugate gradients in float64, relative residual 1e-6), with the clock stopped; the tracking error
is the median of these relative errors.

mlopt runs `mlopt.solve` with warm-started conjugate gradients at two tolerances, with a history of 20 pairs in place of the warm
start, and with one warm-started Neumann term; the fastest setting that tracks counts. The other libraries are called by a loop of
ten lines, which spares them an engine. Their number of iterations is the smallest of 5, 10, 20, 40 and 80 (1 to 80 with a warm
start) that reaches the target tracking error in 30 untimed steps before (up to 20 with --quick). Timed runs take turns of ten
steps; the first step of each run is not timed.
"""

from __future__ import annotations

from typing import Any

from ..workers import Library, Workplace

CASES = ("softmax regression 64-10", "softmax regression 784-10", "MLP 64-256-10")
TRACKING = 1e-2
EVERY = 10


def run(place: Workplace) -> list[dict[str, Any]]:
    """Return a row for each case and setting of each library."""
    return [row for name in CASES if place.wants(name) for row in _case(place, name)]


def _case(place: Workplace, name: str) -> list[dict[str, Any]]:
    file = place.case(name)
    runs = []
    for library in place.libraries:
        for setting in library.about["loops"]:
            most = 20 if place.quick else 80
            iterations = 0 if library.name == "mlopt" else _fewest(library, setting, file, most)
            row = {"library": library.name, "estimator": setting, "case": name, "iterations": iterations}
            runs.append((library, row))
    timed = []
    for library, row in runs:
        if row["iterations"] is None:
            row["note"] = f"no number of iterations up to {most} tracks to {TRACKING:.0%}"
            continue
        process = library.another()
        process.result("load", file=file)
        timed.append((process, row))
    _in_turn(timed, 60 if place.quick else 100)
    rows = [row for _, row in runs]
    _compare(rows)
    return rows


def _fewest(library: Library, setting: str, file: str, most: int) -> int | None:
    """Return the smallest number of iterations that meets the tracking target, or None."""
    library.result("load", file=file)
    for iterations in (1, 2, 5, 10, 20, 40, 80) if "warm" in setting else _promising(library, setting):
        if iterations > most:
            break
        library.send("loop", setting=setting, iterations=iterations, steps=30, every=EVERY)
        answer = library.receive()
        while "pause" in answer:
            answer = library.go_on()
        if "result" in answer and answer["result"]["error"] <= TRACKING:
            return iterations
    return None


def _promising(library: Library, estimator: str) -> list[int]:
    """Return the numbers of iterations whose error at the first point is at most three times the target."""
    counts = []
    for iterations in (5, 10, 20, 40, 80):
        library.result("build", key="call", estimator=estimator, iterations=iterations)
        if library.result("error", key="call")["error"] <= 3 * TRACKING:
            counts.append(iterations)
    return counts


def _in_turn(timed: list[tuple[Library, dict[str, Any]]], steps: int) -> None:
    """Run all loops in turns of ten steps, and fill in the rows."""
    waiting = list(timed)
    for process, row in timed:
        process.send("loop", setting=row["estimator"], iterations=row["iterations"], steps=steps, every=EVERY)
        process.latest = process.receive()  # up to the first pause, one after the other
    while waiting:
        for process, row in list(waiting):
            if "pause" in process.latest:
                process.latest = process.go_on()
                continue
            waiting.remove((process, row))
            process.close()
            answer = process.latest
            if "result" in answer:
                row |= {"steps": steps, **answer["result"]}
            else:
                row["note"] = f"failed: {answer.get('failed') or answer.get('unsupported')}"


def _compare(rows: list[dict[str, Any]]) -> None:
    """Add to each row the time of the best other library that meets the tracking target, divided by its own."""
    peers = [r["seconds"] for r in rows if r["library"] != "mlopt" and r.get("error", 1.0) <= TRACKING]
    for row in rows:
        if peers and "seconds" in row:
            row["best peer / this"] = min(peers) / row["seconds"]
