"""The card of an adapted encoder: what it was made from, what was learned, and what it scored, for whoever finds the folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .result import TapWeightResult

__all__ = ["card"]


def card(result: TapWeightResult, ways: Mapping[str, str]) -> str:
    """Return a model card in Markdown.

    Args:
        result: of the run that adapted the encoder; what the encoder's attribute `card` holds, where it has one, heads the card.
        ways: what the ways of getting an encoder are called.
    """
    front = {**getattr(result.encoder, "card", {}), "tags": ["tapweight", "task-adaptive-pretraining"]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += ["# Encoder adapted by TapWeight", ""]
    lines += [
        f"Pretrained further in {result.steps} steps with several objectives, whose weights were learned from the validation "
        "loss of a task (Zhang, Somayajula & Xie, TMLR 2025, arXiv 2410.10006). This is the encoder before finetuning on it.",
        "",
    ]
    lines += ["## Data", "", *(f"- {name}: {what}" for name, what in result.data.items()), ""]
    lines += ["## Learned weights", "", result.verdict, "", "| objective | weight | signal / error | significant |"]
    lines += ["|---|---|---|---|"]
    for name, weight in sorted(result.weights.items(), key=lambda item: -item[1]):
        signal = result.signals[name]
        lines.append(f"| {name} | {weight:.3f} | {signal.z:+.1f} | {'yes' if signal.significant else 'no'} |")
    better = "higher" if result.greater_is_better else "lower"
    lines += ["", f"## Scores: {result.metric}, {better} is better", "", "| way | validation | test |", "|---|---|---|"]
    lines += [f"| {ways[way]} | {s['valid']:.3f} | {s['test']:.3f} |" for way, s in result.scores.items()]
    lines += ["", "Each way was finetuned on the task with the same budget; the epoch was chosen on validation.", ""]
    settings = {"seed": result.seed, "estimator": result.estimator, **result.settings}
    lines += ["## Settings", "", *(f"- {name}: {value}" for name, value in settings.items()), ""]
    return "\n".join(lines)
