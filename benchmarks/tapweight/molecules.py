"""The molecules of the study: six tasks, 50,000 molecules of ZINC, and a graph network from a random start."""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path

import torch
from rdkit.Chem import MolFromSmiles
from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
from rdkit.Chem.Scaffolds.MurckoScaffold import MurckoScaffoldSmiles
from rdkit.rdBase import BlockLogs
from torch import Tensor

from mlopt.recipes.tapweight.files import DataError
from mlopt.recipes.tapweight.molecules.data import Molecules, read_corpus, read_table
from mlopt.recipes.tapweight.molecules.encoder import GINE
from mlopt.recipes.tapweight.molecules.graphs import canonical
from mlopt.recipes.tapweight.molecules.objectives import make_objective
from mlopt.recipes.tapweight.molecules.splits import scaffold_split
from mlopt.recipes.tapweight.molecules.task import Kind, MoleculeTask
from mlopt.recipes.tapweight.recipe import TapWeight
from mlopt.recipes.tapweight.settings import Settings
from mlopt.recipes.tapweight.task import Task
from mlopt.rng import seed_everything

from .draws import half_of_the_groups, permutation, train_and_valid
from .modality import Modality
from .plan import Labels, Plan

__all__ = ["STANDARD", "MoleculeStudy"]

TASKS = ("bbbp", "bace", "clintox", "esol", "freesolv", "bace_pic50")
#: A draw of few labels may lack a class; so many draws are tried.
_ATTEMPTS = 100

STANDARD = Plan(
    modality="molecules",
    tasks=TASKS,
    methods=(),
    objectives=(
        "masked_atoms",
        "contrastive",
        "functional_groups",
        "fingerprint_clusters",
        "charges",
        "context_prediction",
        "size",
        "polarity",
        "electronics",
        "topology",
        "random_labels",
    ),
    seeds=(10, 11, 12, 13, 14),
    labels=(200,),
    passes=4_000,
    corpus_limit=10_000,
    encoder={"width": 64, "layers": 3},
    settings=Settings(weights_lr=0.03),
)


class MoleculeStudy(Modality):
    """Molecules: graphs, random scaffold splits, GINE."""

    plain = "ECFP + ridge, no encoder"

    @cached_property
    def _corpus(self) -> Molecules:
        return read_corpus(self.plan.corpus or self.plan.data / "mol" / "zinc_50k.csv.gz", limit=self.plan.corpus_limit)

    def corpus_of(self, task: str) -> str:
        """Return the same name for every task."""
        return "corpus"

    def task(self, name: str, seed: int, labels: Labels) -> MoleculeTask:
        """Return a task; its scaffolds are shuffled by the seed, and those of half of the molecules are the test set."""
        file = self.plan.table or self.plan.data / "mol" / f"{name}.csv"
        molecules, scaffolds, names = _read(file)
        if self.plan.split == "usual":
            usual = scaffold_split(molecules.smiles)
            pool, test = usual["train"] + usual["valid"], usual["test"]
        else:
            pool, test = half_of_the_groups(scaffolds, seed)
        # Some files, such as that of ESOL, list molecules twice, some of them without a ring.
        known = {names[index] for index in pool}
        test = [index for index in test if names[index] not in known]
        test = sorted(test[place] for place in permutation(len(test), "test", seed)[: self.plan.test_limit])
        for attempt in range(_ATTEMPTS):
            if self.plan.split == "usual" and labels == "all":
                train, valid = usual["train"], usual["valid"]
            else:
                train, valid = train_and_valid(pool, labels, seed, attempt)
            parts = {"train": train, "valid": valid, "test": test}
            try:
                return MoleculeTask(
                    {split: molecules.subset(chosen) for split, chosen in parts.items()},  # type: ignore[misc]
                    label_names=molecules.label_names,
                    kind=_kind(molecules),
                )
            except DataError as error:
                fault = error
        raise DataError(f"{name}: none of {_ATTEMPTS} draws of {labels} labels can be scored ({fault}); draw more")

    def recipe(self, corpus: str, task: Task, seed: int) -> TapWeight:
        """Return the recipe of a seed."""
        seed_everything(seed)
        return TapWeight(
            GINE(**self.plan.encoder).to(self.plan.device),
            [make_objective(name) for name in self.plan.objectives],
            task,
            self._corpus,
            settings=self.plan.settings,
            seed=seed,
        )

    def plain_features(self, task: Task) -> tuple[Tensor, Tensor]:
        """Return the counts of the circular substructures of radius 2, folded to 1,024 (ECFP), as logarithms."""
        generator = GetMorganGenerator(radius=2, fpSize=1_024)

        def counts(split: str) -> Tensor:
            smiles = [graph.smiles for graph in task.splits[split]]  # type: ignore[index]
            with BlockLogs():
                rows = [torch.from_numpy(generator.GetCountFingerprintAsNumPy(MolFromSmiles(text))) for text in smiles]
            return torch.stack([row.double() for row in rows]).log1p()

        return torch.cat([counts("train"), counts("valid")]), counts("test")


@cache
def _read(file: Path) -> tuple[Molecules, tuple[str, ...], tuple[str, ...]]:
    """Return the molecules of a file, their scaffolds and canonical SMILES; a molecule without a ring is a group of its own.

    As one group they would never be in the test set where they are more than half, as in FreeSolv.
    """
    # The numbers as they are: classes of the study are 0 and 1, see `_kind`.
    molecules = read_table(file, kind="regression")
    with BlockLogs():
        scaffolds = [MurckoScaffoldSmiles(smiles, includeChirality=True) for smiles in molecules.smiles]
    groups = tuple(scaffold or f"row {row}" for scaffold, row in zip(scaffolds, molecules.rows, strict=True))
    return molecules, groups, tuple(map(canonical, molecules.smiles))


def _kind(molecules: Molecules) -> Kind:
    """Return the kind of the whole task: a draw of numbers that are all 0 or 1 would be mistaken for classes."""
    labels = torch.cat([graph.y for graph in molecules])
    return "classification" if ((labels == 0) | (labels == 1) | labels.isnan()).all() else "regression"
