"""Several processes can share a run if all have the same encoder, settings and data."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import attrs

from mlopt.errors import ProblemError
from mlopt.problem import copied, fingerprint
from mlopt.rng import preserved

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mlopt.ranks import Ranks

    from .experiment import Experiment

__all__ = ["require_same_run"]


def require_same_run(ranks: Ranks, experiment: Experiment, methods: Sequence[str]) -> None:
    """Raise unless all processes begin the same run.

    Compared are the start, bit for bit, the settings, and the data: their sizes, and the whole numbers and labels of the first
    batches.

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


def _prints(experiment: Experiment, methods: Sequence[str]) -> dict[str, Any]:
    """Return what must be the same in all processes, by a plural noun."""
    task = experiment.task
    prints: dict[str, Any] = {
        "the arguments": (*methods, *experiment.names, experiment.steps, experiment.seed, str(experiment.estimator)),
        "the settings": repr(attrs.asdict(experiment.settings)),
        "the variables of the encoder or of the objectives' heads": fingerprint(experiment.model()),
        "the examples of the corpus": (len(experiment.corpus), _print_of(experiment.stream("agreement").next())),
    }
    for split, examples in task.splits.items():
        batch = next(iter(task.loader(split, min(len(examples), 256))))
        labels = zlib.crc32(task.targets(batch).cpu().contiguous().numpy().data)
        prints[f"the examples of the {split} split"] = (len(examples), labels, _print_of(batch))
    return prints


def _print_of(batch: Any) -> list[tuple[tuple[int, ...], int]]:
    """Return the shape of each tensor of a batch, and the checksum of each that holds whole numbers."""
    tensors: list[Tensor] = []
    copied(batch, tensors)
    return [
        (tuple(t.shape), 0 if t.is_floating_point() else zlib.crc32(t.cpu().contiguous().numpy().data)) for t in tensors
    ]
