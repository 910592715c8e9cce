"""Self-supervised objectives for molecules, by name: a view of the batch, a head and a loss each."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ...names import chosen
from .charges import Charges
from .context_prediction import ContextPrediction
from .contrastive import ContrastiveViews
from .descriptors import FAMILIES, Descriptors
from .fingerprint_clusters import FingerprintClusters
from .fingerprint_counts import FingerprintCounts
from .fragment_counts import FragmentCounts
from .functional_groups import FunctionalGroups
from .masked_atoms import MaskedAtoms
from .masked_bonds import MaskedBonds
from .random_labels import RandomLabels

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...objective import Objective

__all__ = [
    "DEFAULT",
    "FAMILIES",
    "OBJECTIVES",
    "Charges",
    "ContextPrediction",
    "ContrastiveViews",
    "Descriptors",
    "FingerprintClusters",
    "FingerprintCounts",
    "FragmentCounts",
    "FunctionalGroups",
    "MaskedAtoms",
    "MaskedBonds",
    "RandomLabels",
    "make_objective",
]

OBJECTIVES: dict[str, Callable[[], Objective]] = {
    "masked_atoms": MaskedAtoms,
    "masked_bonds": MaskedBonds,
    "contrastive": ContrastiveViews,
    "functional_groups": FunctionalGroups,
    "fingerprint_clusters": FingerprintClusters,
    "descriptors": Descriptors,
    "fingerprint_counts": FingerprintCounts,
    "fragment_counts": FragmentCounts,
    "charges": Charges,
    "context_prediction": ContextPrediction,
    **{name: partial(Descriptors, properties, name) for name, properties in FAMILIES.items()},
    "random_labels": RandomLabels,
}
#: The objectives of a run that names none.
DEFAULT = ("masked_atoms", "masked_bonds", "contrastive", "functional_groups", "fingerprint_clusters", "descriptors")


def make_objective(name: str) -> Objective:
    """Return the objective of that name, with its default settings.

    Raises:
        ValueError: no objective has that name; the message lists the names.
    """
    return chosen("objective", name, OBJECTIVES)()
