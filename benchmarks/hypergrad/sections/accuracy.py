"""Error and cost of every estimator of every library, at the same points and numbers of iterations.

Time, operations and memory of one hypergradient are relative to one plain gradient of the inner loss in the same process.
Times are medians of ratios over rounds in which all calls of all libraries take turns.
"""

from __future__ import annotations

from typing import Any

from ..adapters import ONE_SHOT, family
from ..cases import RECIPES
from ..workers import Library, Workplace

QUICK = ("quadratic, condition 100", "logistic regression", "MLP 64-256-10")
LEFT_OUT = ("MLP with dropout", "softmax regression 64-10", "softmax regression 784-10", "MLP of 1M")


def run(place: Workplace) -> list[dict[str, Any]]:
    """Return a row for each case, library, estimator and number of iterations."""
    names = QUICK if place.quick else tuple(name for name in RECIPES if name not in LEFT_OUT)
    return [row for name in names if place.wants(name) for row in _case(place, name)]


def _case(place: Workplace, name: str) -> list[dict[str, Any]]:
    recipe = RECIPES[name]
    file = place.case(name)
    rows, timed = [], []
    for library in place.libraries:
        library.result("load", file=file)
        plain = library.result("cost", key="plain")
        for estimator in library.about["estimators"]:
            for k in _iterations(estimator, recipe.at_optimum, place.quick):
                if not place.wants(name, estimator, k):
                    continue
                key = f"{estimator}, {k}"
                row = {"case": name, "library": library.name, "estimator": estimator, "iterations": k}
                row |= {"dtype": str(recipe.dtype).removeprefix("torch."), **_accuracy(library, key, estimator, k)}
                rows.append(row)
                if "note" not in row:
                    own = library.result("cost", key=key)
                    row |= {quantity: own[quantity] / plain[quantity] for quantity in own if plain[quantity]}
                    if estimator.endswith("compiled"):
                        row.pop("flops", None)  # the counter does not see the operations of compiled code
                    timed.append((library, key, row))
    ratios = place.ratios([(library, key) for library, key, _ in timed], 3 if place.quick else 7)
    for (_, _, row), ratio in zip(timed, ratios, strict=True):
        row["time"] = ratio
    return rows


def _iterations(estimator: str, at_optimum: bool, quick: bool) -> tuple[int, ...]:
    if family(estimator) in ONE_SHOT:
        return (0,)
    # Away from a minimum, unrolling leaves the point and differentiates another function.
    if family(estimator) == "Unrolled" and not at_optimum:
        return ()
    # An estimator with more than its family in its name is a variant, with other products or equations.
    return (10,) if not at_optimum or (quick and estimator != family(estimator)) else (10, 100)


def _accuracy(library: Library, key: str, estimator: str, k: int) -> dict[str, Any]:
    for method, arguments in (("build", {"estimator": estimator, "iterations": k}), ("error", {})):
        answer = library.ask(method, key=key, **arguments)
        if "result" not in answer:
            return {"note": answer.get("unsupported") or f"failed: {answer['failed']}"}
    measured: dict[str, Any] = answer["result"]
    return measured
