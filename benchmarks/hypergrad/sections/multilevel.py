"""More than two levels: the error of exact estimators on chains, a diamond and nests, against closed forms."""

from __future__ import annotations

from typing import Any

from ..workers import Workplace

SIZE = 5
NESTS = ("chain_of_three", "chain_of_four", "diamond", "nested", "nested_twice", "nested_with_two_inside")


def run(place: Workplace) -> list[dict[str, Any]]:
    """Return a row for each library, estimator and shape."""
    rows = []
    for library in place.libraries:
        for estimator in library.about["graphs"]:
            for shape in ("chain 2", "chain 3", "ladder 1"):
                row = {"library": library.name, "estimator": estimator, "case": shape}
                # Conjugate gradients need at most one iteration for each variable.
                k = SIZE if estimator == "ConjugateGradient" else 50
                answer = library.ask("graph", key="call", shape=shape, size=SIZE, estimator=estimator, iterations=k)
                if "result" in answer:
                    answer = library.ask("graph_error", key="call")
                note = {"note": answer.get("unsupported") or f"failed: {answer.get('failed')}"}
                rows.append(row | answer.get("result", note))
        if library.name == "mlopt":
            for estimator in ("Dense", "ConjugateGradient"):
                for shape in NESTS:
                    error = library.result("closed_form", shape=shape, estimator=estimator)
                    rows.append({"library": "mlopt", "estimator": estimator, "case": shape, "error": error})
        elif library.about["graphs"]:
            note = "not expressed: products of a middle level leave out the response of the levels inside it"
            rows.append({"library": library.name, "estimator": "any", "case": "nested", "note": note})
    return rows
