"""TapWeight on text: any transformers encoder, objectives, tasks. Names are imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlopt.imports import import_lazily

if TYPE_CHECKING:
    from .batches import Collate
    from .data import from_dataset, read_corpus, read_table
    from .encoder import TextEncoder
    from .glue_tasks import glue
    from .multi import MultiTextTask
    from .objectives import OBJECTIVES, make_objective
    from .predictor import Predictor
    from .task import TextTask

__all__ = [
    "OBJECTIVES",
    "Collate",
    "MultiTextTask",
    "Predictor",
    "TextEncoder",
    "TextTask",
    "from_dataset",
    "glue",
    "make_objective",
    "read_corpus",
    "read_table",
]

__getattr__ = import_lazily(
    __name__,
    {
        "batches": ("Collate",),
        "data": ("from_dataset", "read_corpus", "read_table"),
        "encoder": ("TextEncoder",),
        "glue_tasks": ("glue",),
        "multi": ("MultiTextTask",),
        "objectives": ("OBJECTIVES", "make_objective"),
        "predictor": ("Predictor",),
        "task": ("TextTask",),
    },
)
