"""The tasks of GLUE, by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import attrs
import datasets

from ..files import DataError
from ..names import suggestion
from ..splits import random_split
from ..tables import is_folder
from .data import from_dataset

if TYPE_CHECKING:
    import os

    from ..task import Split
    from .data import Texts

__all__ = ["GLUE", "glue"]

_REPOSITORY = "nyu-mll/glue"
_HELD_OUT = 0.1


@attrs.frozen
class Glue:
    """A task of GLUE: its columns of text, its metric, and its split that has public labels."""

    text: tuple[str, ...]
    metric: str
    labelled: str = "validation"


GLUE: dict[str, Glue] = {
    "cola": Glue(("sentence",), "matthews"),
    "sst2": Glue(("sentence",), "accuracy"),
    "mrpc": Glue(("sentence1", "sentence2"), "accuracy"),
    "stsb": Glue(("sentence1", "sentence2"), "pearson"),
    "qqp": Glue(("question1", "question2"), "accuracy"),
    "mnli": Glue(("premise", "hypothesis"), "accuracy", "validation_matched"),
    "qnli": Glue(("question", "sentence"), "accuracy"),
    "rte": Glue(("sentence1", "sentence2"), "accuracy"),
    "wnli": Glue(("sentence1", "sentence2"), "accuracy"),
}


def glue(
    name: str, *, seed: int = 0, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[dict[Split, Texts], str]:
    """Read a task of GLUE with `datasets`, which downloads it if it is not in the cache.

    The labels of its test split are not public: "test" is the validation split that has labels, and "valid" a tenth of the
    training split, drawn by the seed.

    Args:
        name: "cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte" or "wnli".
        seed: the seed of that draw.
        cache_dir: the folder of `datasets`; its own default when None.

    Returns:
        The splits, and the name of the task's metric.

    Raises:
        DataError: the name is unknown, or the data cannot be fetched.

    Source: Wang et al., "GLUE", ICLR 2019.
    """
    if name not in GLUE and is_folder(name):
        raise DataError(f"dataset={name!r} is a folder, not a task of GLUE; give it with --train")
    if name not in GLUE:
        raise DataError(f"dataset={name!r} is not a task of GLUE{suggestion(name, GLUE)}")
    task = GLUE[name]
    try:
        loaded: Any = datasets.load_dataset(_REPOSITORY, name, cache_dir=None if cache_dir is None else str(cache_dir))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        sentence = " ".join(str(error).split())
        raise DataError(f"GLUE's {name} cannot be fetched ({sentence}); pass the files with --train instead") from error
    train, test = (
        from_dataset(loaded[split], text=task.text, name=f"GLUE {name} {split}") for split in ("train", task.labelled)
    )
    parts = random_split(len(train), (1 - _HELD_OUT, _HELD_OUT / 2, _HELD_OUT / 2), seed)
    held = sorted((*parts["valid"], *parts["test"]))
    splits: dict[Split, Texts] = {"train": train.subset(parts["train"]), "valid": train.subset(held), "test": test}
    return splits, task.metric
