"""TapWeight on text: any transformers encoder, objectives, tasks. Names are imported when they are asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import Collate
    from .data import from_dataset, read_corpus, read_table
    from .encoder import TextEncoder
    from .glue_tasks import glue
    from .objectives import OBJECTIVES, make_objective
    from .task import TextTask

__all__ = [
    "OBJECTIVES",
    "Collate",
    "TextEncoder",
    "TextTask",
    "from_dataset",
    "glue",
    "make_objective",
    "read_corpus",
    "read_table",
]

_HOMES = {
    "batches": ("Collate",),
    "data": ("from_dataset", "read_corpus", "read_table"),
    "encoder": ("TextEncoder",),
    "glue_tasks": ("glue",),
    "objectives": ("OBJECTIVES", "make_objective"),
    "task": ("TextTask",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{home}", __name__), name)
    raise AttributeError(f"{__name__} has no {name!r}; it has {', '.join(__all__)}")
