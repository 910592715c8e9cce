"""Self-supervised objectives for molecules, by name: a view of the batch, a head and a loss each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...names import chosen
from .contrastive import ContrastiveViews
from .descriptors import Descriptors
from .fingerprint_clusters import FingerprintClusters
from .functional_groups import FunctionalGroups
from .masked_atoms import MaskedAtoms
from .masked_bonds import MaskedBonds
from .random_labels import RandomLabels

if TYPE_CHECKING:
    from ...objective import Objective

__all__ = [
    "OBJECTIVES",
    "ContrastiveViews",
    "Descriptors",
    "FingerprintClusters",
    "FunctionalGroups",
    "MaskedAtoms",
    "MaskedBonds",
    "RandomLabels",
    "make_objective",
]

OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective
    for objective in (
        MaskedAtoms,
        MaskedBonds,
        ContrastiveViews,
        FunctionalGroups,
        FingerprintClusters,
        Descriptors,
        RandomLabels,
    )
}


def make_objective(name: str) -> Objective:
    """Return the objective of that name, with its default settings.

    Raises:
        ValueError: no objective has that name; the message lists the names.
    """
    return chosen("objective", name, OBJECTIVES)()
