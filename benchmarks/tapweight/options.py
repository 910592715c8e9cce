"""The command line of the study, as a plan."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import attrs

from mlopt.recipes.tapweight.methods import METHODS
from mlopt.recipes.tapweight.modality import device_of
from mlopt.recipes.tapweight.names import chosen

from .plan import FINETUNINGS, PLAIN, Labels, Plan
from .variants import VARIANTS, method_of

__all__ = ["parser", "plan_of", "standard_of"]


def parser(modality: str) -> argparse.ArgumentParser:
    """Return the parser of a study's options."""
    own = argparse.ArgumentParser(
        prog=f"python -m benchmarks.tapweight {modality}",
        epilog="The commands are molecules (if none is named), text, ablation, report and cost.",
        description="Adapt an encoder by each method with the same number of encoder passes, and score it on each task. A row "
        "that the file holds already is not computed again.",
    )
    size = own.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true", help="minutes: one task, one seed, few steps; scores mean nothing"
    )
    size.add_argument("--full", action="store_true", help="for a GPU: ten seeds, five label counts, both finetunings")
    own.add_argument("--json", metavar="FILE", type=Path, help="append the rows to FILE, a row a line")
    own.add_argument("--tasks", nargs="+", metavar="TASK", help="the tasks (default: all of the modality)")
    own.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"of {', '.join((*METHODS, 'single:OBJECTIVE', PLAIN, *VARIANTS))}; METHOD:SETTING=VALUE,... changes settings",
    )
    own.add_argument("--objectives", nargs="+", metavar="NAME", help="the objectives (default: all of the modality)")
    own.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="use fresh ones for a claim")
    own.add_argument(
        "--labels", nargs="+", type=_labels, metavar="N|all", help="training and validation labels together"
    )
    own.add_argument("--passes", type=_count, metavar="N", help="the encoder passes that each method may spend")
    own.add_argument("--finetuning", nargs="+", choices=FINETUNINGS, help="frozen features, or the whole encoder")
    if modality == "molecules":
        own.add_argument("--split", choices=("half", "usual"), help="half of the scaffolds as the test set, or 8:1:1")
    else:
        own.add_argument("--from-scratch", action="store_true", help="a small encoder from a random start")
    own.set_defaults(split=None, from_scratch=False)
    own.add_argument("--corpus", type=Path, metavar="FILE", help="your unlabelled examples; with --table")
    own.add_argument("--table", type=Path, metavar="FILE", help="your labelled examples; with --corpus")
    own.add_argument(
        "--data", type=Path, default=Path(os.environ.get("MLOPT_DATA", "../shared/data")), metavar="FOLDER"
    )
    own.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="default: cpu")
    own.add_argument("--processes", type=_count, default=1, metavar="N", help="seeds that run at the same time")
    own.add_argument(
        "--plan", action="store_true", help="print the missing rows and about how long they take, and stop"
    )
    return own


def _labels(text: str) -> Labels:
    return "all" if text == "all" else _count(text)


def _count(text: str) -> int:
    """Return a number of at least 1."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def standard_of(modality: str) -> Plan:
    """Return the standard plan of a modality."""
    if modality == "molecules":
        from .molecules import STANDARD
    else:
        from .text import STANDARD
    return STANDARD


def _objectives_of(modality: str) -> Mapping[str, object]:
    """Return the objectives of a modality by name."""
    if modality == "molecules":
        from mlopt.recipes.tapweight.molecules.objectives import OBJECTIVES as OF_MOLECULES

        return OF_MOLECULES
    from mlopt.recipes.tapweight.text.objectives import OBJECTIVES as OF_TEXTS

    return OF_TEXTS


def plan_of(standard: Plan, options: argparse.Namespace) -> Plan:
    """Return the plan of a command line.

    Args:
        standard: the standard plan of the modality.
        options: the parsed options.

    Raises:
        ArgumentError: there is no such task, method or objective, or no such device.
    """
    for task in options.tasks or ():
        chosen("task", task, dict.fromkeys(standard.tasks))
    for objective in options.objectives or ():
        chosen("objective", objective, _objectives_of(standard.modality))
    for method in options.methods or ():
        if method != PLAIN:
            method_of(method)
    plan = standard
    if options.quick:
        plan = _quick(plan)
    elif options.full:
        plan = attrs.evolve(
            plan, methods=(), seeds=tuple(range(10, 20)), labels=(50, 100, 200, 500, "all"), finetunings=FINETUNINGS
        )
    given = {
        field: tuple(dict.fromkeys(value)) if isinstance(value, list) else value
        for field, value in (
            ("tasks", options.tasks),
            ("objectives", options.objectives),
            ("seeds", options.seeds),
            ("labels", options.labels),
            ("passes", options.passes),
            ("finetunings", options.finetuning),
            ("split", options.split),
            ("corpus", options.corpus),
            ("table", options.table),
        )
        if value is not None
    }
    plan = attrs.evolve(plan, data=options.data, device=device_of(options.device), **given)
    if plan.table is not None:
        plan = attrs.evolve(plan, tasks=(plan.table.name.partition(".")[0],))
    if options.from_scratch:
        plan = attrs.evolve(plan, encoder={**plan.encoder, "start": "random"})
    methods = tuple(dict.fromkeys(options.methods or plan.methods or _all_methods(plan)))
    for kind, _, objective in (method.partition(":") for method in methods):
        if kind == "single":
            chosen("objective of this study", objective, dict.fromkeys(plan.objectives))
    return attrs.evolve(plan, methods=methods)


def _quick(plan: Plan) -> Plan:
    # Weights that are learned step by step move at least `measurements` times.
    settings = attrs.evolve(plan.settings, batch_size=16, epochs=2, measurements=2)
    return attrs.evolve(
        plan,
        tasks=plan.tasks[:1],
        seeds=plan.seeds[:1],
        labels=(100,),
        passes=10 * len(plan.objectives),
        corpus_limit=500,
        test_limit=200,
        settings=settings,
    )


def _all_methods(plan: Plan) -> Sequence[str]:
    """Return every method: without an encoder, without pretraining, at fixed and at learned weights."""
    return (PLAIN, *METHODS, *(f"single:{name}" for name in plan.objectives))
