"""Processes can share a run, and a run can be resumed, if the encoder, the settings and the data are the same."""

from __future__ import annotations

import json
import zlib
from typing import TYPE_CHECKING, Any

import attrs

from mlopt.errors import CheckpointError, ProblemError
from mlopt.files import replacing
from mlopt.problem import copied, fingerprint
from mlopt.rng import preserved

from .examples import Examples
from .task import SCORED_AT_ONCE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import Tensor

    from mlopt.ranks import Ranks

    from .experiment import Experiment

__all__ = ["require_same_run", "require_that_run"]

#: The file that describes the run in a folder of checkpoints.
_RUN = "run.json"


def require_same_run(ranks: Ranks, experiment: Experiment, methods: Sequence[str]) -> None:
    """Raise unless all processes begin the same run.

    Compared are the start, bit for bit, the settings, and the data: the whole numbers and labels of all labelled examples, those
    of a batch of the corpus, and the contents of all of a corpus that was read from a file.

    Args:
        ranks: the processes.
        experiment: the run.
        methods: the names of its methods.

    Raises:
        ProblemError: they differ; the message names the first difference.
    """
    if not ranks.several:
        return
    with preserved((experiment.device,)):
        (first, *_) = prints = ranks.all_evaluated(lambda: _prints(experiment, methods))
    for rank, own in enumerate(prints):
        if differing := next((name for name in first if own[name] != first[name]), None):
            raise ProblemError(
                f"TapWeight.fit: {differing} differ between process 0 and process {rank}; build the same in every process: call "
                "torch.manual_seed with one seed before the encoder is built, and read the same files"
            )


def require_that_run(folder: Path, experiment: Experiment, *, resume: bool) -> None:
    """Raise if a folder of checkpoints is that of another run; describe the run in the folder if it does not hold any.

    A phase that ended is read, not repeated, so a changed number would have an effect on some phases only. The methods may
    change: the phases of each are its own.

    Args:
        folder: the folder of the checkpoints.
        experiment: the run.
        resume: if False, checkpoints in the folder are refused later.

    Raises:
        CheckpointError: the runs differ; the message names the first difference.
    """
    file, own = folder / _RUN, _description(experiment)
    if resume and file.is_file():
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(
                f"{file}: it is damaged ({error}); delete it if the run is the same, or give another folder"
            ) from error
        for name in own["options"]:
            if (value := before["options"].get(name)) != own["options"][name]:
                raise CheckpointError(
                    f"{file}: the run has {name}={value!r}, not {own['options'][name]!r}; resume with the same options, or give "
                    "another folder"
                )
        if differing := next(
            (name for name in own["states"] if before["states"].get(name) != own["states"][name]), None
        ):
            raise CheckpointError(
                f"{file}: {differing} differ from those of the run; build the same encoder (call torch.manual_seed before it is "
                "built) and read the same files, or give another folder"
            )
    elif resume or not any(folder.glob("*/step-*")):
        with replacing(file) as staged:
            staged.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")


def _description(experiment: Experiment) -> dict[str, Any]:
    """Return the options and the states of a run, as JSON holds them."""
    options = {
        "seed": experiment.seed,
        "objectives": experiment.names,
        "estimator": str(experiment.estimator),
        "metric": experiment.task.metric_name,
        # Under a budget, each method has steps of its own.
        "passes": experiment.budget,
        "steps": experiment.steps if experiment.budget is None else None,
        **attrs.asdict(experiment.settings),
    }
    with preserved((experiment.device,)):
        whole = {"options": options, "states": _states(experiment)}
    plain: dict[str, Any] = json.loads(json.dumps(whole))
    return plain


def _prints(experiment: Experiment, methods: Sequence[str]) -> dict[str, Any]:
    """Return what must be the same in all processes, by a plural noun."""
    return {
        "the arguments": (*methods, *experiment.names, experiment.steps, experiment.seed, str(experiment.estimator)),
        "the settings": repr(attrs.asdict(experiment.settings)),
        **_states(experiment),
    }


def _states(experiment: Experiment) -> dict[str, Any]:
    """Return checksums of the start and of the data, by a plural noun."""
    task, corpus = experiment.task, experiment.corpus
    contents = corpus.checksum() if isinstance(corpus, Examples) else 0
    prints: dict[str, Any] = {
        "the variables of the encoder or of the objectives' heads": fingerprint(experiment.model()),
        "the examples of the corpus": (len(corpus), contents, _print_of(experiment.stream("agreement").next())),
    }
    for split, examples in task.splits.items():
        labels = inputs = 0
        for batch in task.loader(split, SCORED_AT_ONCE):
            labels = zlib.crc32(task.targets(batch).cpu().contiguous().numpy().data, labels)
            inputs = zlib.crc32(repr(_print_of(batch)).encode(), inputs)
        prints[f"the examples of the {split} split"] = (len(examples), labels, inputs)
    return prints


def _print_of(batch: Any) -> list[tuple[tuple[int, ...], int]]:
    """Return the shape of each tensor of a batch, and the checksum of each that holds whole numbers."""
    tensors: list[Tensor] = []
    copied(batch, tensors)
    return [
        (tuple(t.shape), 0 if t.is_floating_point() else zlib.crc32(t.cpu().contiguous().numpy().data)) for t in tensors
    ]
