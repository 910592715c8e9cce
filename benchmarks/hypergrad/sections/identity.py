"""The estimators that replace the inverse Hessian by the identity: one mixed product f_ux F_x.

- time: time of a hypergradient relative to one plain gradient of the inner loss (float32).
- error: error of the mixed product in float32 against the exact product in float64 at the same point. F does not depend on u
  directly here, so the hypergradient is the product.
- bfloat16: the same error with the inner variables and the data in bfloat16 (u in float32), against float64 at that point.
- deviation: dropout is always on, with new masks in each call. For calls h_1 .. h_R: sqrt(mean ||h_r - m||^2) / ||m||; m is the
  mean of exact products, each with one set of masks. Masks differ from call to call for every library, so an exact product
  deviates too: see the row "exact". A larger deviation comes from masks that differ within a call, between the two sides of a
  difference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import cases, exact
from ..adapters import family
from ..workers import Library, Workplace

CASE, DROPOUT = "MLP 784-256-10", "MLP with dropout"


def run(place: Workplace) -> list[dict[str, Any]]:
    """Return a row for each estimator of this family, and one for the exact product with dropout."""
    case = CASE if not place.quick else "MLP 64-256-10"
    rows = []
    for library in place.libraries:
        for estimator in library.about["estimators"]:
            if family(estimator) in ("Identity", "FiniteDifference"):
                row = {"library": library.name, "estimator": estimator, "case": case, "iterations": 0}
                rows.append((library, row | _product(place, library, case, estimator)))
    for library in {id(library): library for library, _ in rows}.values():
        library.result("load", file=place.case(case))
    _time(place, rows)
    repeats = 10 if place.quick else 40
    mean, floor = _masked(place.case(DROPOUT), 4 * repeats)
    for library, row in rows:
        library.result("load", file=place.case(DROPOUT))
        library.result("build", key="call", estimator=row["estimator"], iterations=0)
        gradients = torch.tensor(library.result("repeats_of", key="call", count=repeats), dtype=torch.float64)
        row["deviation"] = _deviation(gradients, mean)
    exact_row = {"library": "exact", "estimator": "one set of masks", "case": DROPOUT, "deviation": floor}
    return [row for _, row in rows] + [exact_row]


def _product(place: Workplace, library: Library, case: str, estimator: str) -> dict[str, float]:
    library.result("load", file=place.case(case))
    library.result("build", key="call", estimator=estimator, iterations=0)
    error = library.result("error", key="call", against="identity")["error"]
    library.result("load", file=place.case(case), dtype="bfloat16", outer_dtype="float32")
    library.result("build", key="call", estimator=estimator, iterations=0)
    answer = library.ask("bfloat16_error", key="call")
    low = {"bfloat16": answer["result"]} if "result" in answer else {"note": f"bfloat16: {answer['failed']}"}
    return {"error": error, **low}


def _time(place: Workplace, rows: list[tuple[Library, dict[str, Any]]]) -> None:
    for library, row in rows:
        library.result("build", key=row["estimator"], estimator=row["estimator"], iterations=0)
    wanted = [(library, row["estimator"]) for library, row in rows]
    for (_, row), ratio in zip(rows, place.ratios(wanted, 5 if place.quick else 20), strict=True):
        row["time"] = ratio


def _masked(file: str, count: int) -> tuple[Tensor, float]:
    """Return the mean of exact products with one set of masks each, and their deviation from it."""
    case = cases.load(file)
    exact_products = []
    for seed in range(count):
        torch.manual_seed(10_000 + seed)
        exact_products.append(exact.hypergradient(case, identity=True)[0])
    products = torch.stack(exact_products)
    return products.mean(0), _deviation(products, products.mean(0))


def _deviation(gradients: Tensor, mean: Tensor) -> float:
    return float((gradients - mean).square().sum(1).mean().sqrt() / mean.norm())
