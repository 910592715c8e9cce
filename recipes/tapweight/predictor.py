"""The predictor of a run: finetuned models of one task, which predict for new examples, are saved, and are loaded again."""

from __future__ import annotations

import json
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import attrs
import torch
from safetensors import SafetensorError

from mlopt.errors import ArgumentError, MloptError
from mlopt.files import replacing, saving
from mlopt.problem import to_device

from .examples import UnusableError
from .files import DataError
from .predictions import Predictions, Target

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from .encoder import Encoder

__all__ = ["MODEL", "PREDICTOR", "Member", "Predictor", "check_free", "describe", "model_folder"]

#: An encoder and the head of the task.
Member = tuple["Encoder", "nn.Module"]
#: The file that describes a saved predictor.
PREDICTOR = "predictor.json"
#: The folder of the predictor in the folder of a result.
MODEL = "model"
_FORMAT, _VERSION = "mlopt-predictor", 1
_BATCH_SIZE = 256


class Predictor(ABC):
    """Finetuned models of one task. Several of them are an ensemble: predictions are means, and have a spread.

    Args:
        members: encoders with the heads of the task; put in eval mode.
        target: the labels.
        columns: the names of the contents of an example, such as "smiles".
        file_columns: the columns of the training file that hold the contents; `read` takes them if a file has them.

    Attributes:
        modality: the name of the modality that the examples are of.
    """

    modality: ClassVar[str]

    def __init__(
        self, members: Sequence[Member], target: Target, columns: Sequence[str], file_columns: Sequence[str] = ()
    ) -> None:
        self.members, self.target = tuple(members), target
        self.columns, self.file_columns = tuple(columns), tuple(file_columns)
        for member in self.members:
            for part in member:
                part.eval()

    @abstractmethod
    def example(self, content: Any) -> Any:
        """Return the example of some contents.

        Raises:
            UnusableError: the contents are not an example.
        """

    @abstractmethod
    def collate(self, examples: list[Any]) -> Any:
        """Join examples into a batch that the encoder takes."""

    @abstractmethod
    def outputs(self, encoder: Encoder, head: nn.Module, batch: Any) -> Tensor:
        """Return the head's outputs (B, K): logits, or standardised predictions."""

    def scored(self, values: Tensor) -> Tensor:
        """Return the outputs that metrics of the task take for predicted values (N, K), see `Task.measures`."""
        return self.target.scored(values)

    @abstractmethod
    def contents(self, example: Any) -> tuple[str, ...]:
        """Return the contents of an example, one for each of `columns`."""

    @abstractmethod
    def read(self, file: str | os.PathLike[str], columns: Sequence[str] | None = None) -> list[Any]:
        """Return the contents of all rows of a file, also of those that are not examples.

        Args:
            file: as for a corpus, or a labelled table whose labels are ignored.
            columns: the columns of the contents; those of the training file, else the usual ones, when None.

        Raises:
            DataError: the file cannot be used.
        """

    @abstractmethod
    def options(self) -> dict[str, Any]:
        """Return the options of `load_member`, for a JSON file."""

    @abstractmethod
    def save_member(self, encoder: Encoder, head: nn.Module, folder: Path) -> None:
        """Write a member into a folder."""

    @classmethod
    @abstractmethod
    def load_member(cls, folder: Path, target: Target, options: dict[str, Any]) -> Member:
        """Return the member that `save_member` wrote."""

    def predict(self, contents: Sequence[Any]) -> Predictions:
        """Predict the labels of examples.

        Args:
            contents: an entry for each example, such as a SMILES. An entry that is not an example stays in place: its predictions
                are NaN, with the reason.

        Returns:
            The predictions, in the same order. They are the same, bit for bit, for the same contents on the same machine; the
            last bits depend on the examples that share a batch.

        Raises:
            ArgumentError: the contents are not a sequence.
        """
        return self._predictions(contents, self.example)

    def predict_examples(self, examples: Sequence[Any]) -> Predictions:
        """Predict the labels of examples that are made already, such as those of a split of the task."""
        return self._predictions(examples, lambda example: example)

    def _predictions(self, contents: Sequence[Any], make: Callable[[Any], Any]) -> Predictions:
        size = (len(self.members), len(self.target.names))
        values, reasons = self._over(contents, size, self._values, make)
        spread = values.std(1).numpy() if len(self.members) > 1 else None
        return Predictions(target=self.target, values=values.mean(1).numpy(), spread=spread, reasons=reasons)

    def embed(self, contents: Sequence[Any]) -> NDArray[np.float64]:
        """Return the features (N, width) of examples, of the finetuned encoder of the first member.

        Args:
            contents: as in `predict`; the features of an entry that is not an example are NaN.

        Raises:
            ArgumentError: the contents are not a sequence.
        """
        return self.features(contents)[0]

    def features(self, contents: Sequence[Any]) -> tuple[NDArray[np.float64], tuple[str, ...]]:
        """Return the features of `embed`, and for each entry the reason why it cannot be used; empty if it can."""
        encoder, _ = self.members[0]
        features, reasons = self._over(contents, (encoder.width,), encoder.pool, self.example)
        return features.numpy(), reasons

    def _values(self, batch: Any) -> Tensor:
        """Return the values of each member, (B, M, K)."""
        return torch.stack([self.target.values(self.outputs(*member, batch)) for member in self.members], 1)

    def _over(
        self,
        contents: Sequence[Any],
        size: tuple[int, ...],
        function: Callable[[Any], Tensor],
        make: Callable[[Any], Any],
    ) -> tuple[Tensor, tuple[str, ...]]:
        """Evaluate a function of batches on the examples that `make` makes of contents.

        Returns:
            The results (N, *size) in float64, NaN where there is no example; and for each entry the reason, else an empty text.
        """
        if isinstance(contents, str) or not len(contents):
            raise ArgumentError(f"contents={contents!r}; give a sequence with at least one entry")
        device = next(self.members[0][0].parameters()).device
        whole, reasons = torch.full((len(contents), *size), torch.nan, dtype=torch.float64), list[str]()
        for start in range(0, len(contents), _BATCH_SIZE):
            # By index: a slice of a split may be more than a list, and a pandas column has slices of another meaning.
            part = [contents[k] for k in range(start, min(start + _BATCH_SIZE, len(contents)))]
            examples, own = _examples(part, make)
            if examples:
                places = [start + k for k, reason in enumerate(own) if not reason]
                with torch.no_grad():
                    whole[places] = function(to_device(self.collate(examples), device)).double().cpu()
            reasons += own
        return whole, tuple(reasons)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the predictor into a folder, for `load`. The first member lies in the folder, the others in folders inside it.

        Args:
            folder: made if it is missing; an earlier predictor in it is replaced.

        Raises:
            DataError: the folder holds something else.
        """
        folder = Path(folder)
        check_free(folder)
        if folder.exists():
            shutil.rmtree(folder)
        for k, (encoder, head) in enumerate(self.members):
            place = _place(folder, k)
            place.mkdir(parents=True)
            with saving(place):
                self.save_member(encoder, head, place)
        content = {"format": _FORMAT, "version": _VERSION, "modality": self.modality, "members": len(self.members)}
        content |= {"columns": self.columns, "file_columns": self.file_columns}
        content |= {"target": attrs.asdict(self.target), "options": self.options()}
        with replacing(folder / PREDICTOR) as staged:
            staged.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, device: str = "cpu") -> Self:
        """Return the predictor that `save` wrote; its predictions are the same, bit for bit, on the same machine.

        Args:
            folder: the folder of a run's result, or the folder `model` in it.
            device: the device to compute on.

        Raises:
            DataError: the folder holds no predictor of this kind, or a file is missing or damaged.
            ValueError: the encoder cannot be loaded.
        """
        folder = model_folder(folder)
        content = describe(folder)
        if content["modality"] != cls.modality:
            own = content["modality"]
            raise DataError(
                f"{folder} holds a predictor of {own}, not of {cls.modality}; load it with the Predictor of {own}"
            )
        try:
            target = Target.read(content["target"])
            members = [
                cls.load_member(_place(folder, k), target, content["options"]) for k in range(int(content["members"]))
            ]
        except ArgumentError as error:
            raise _damaged(folder, error) from error
        except MloptError:
            raise  # with a remedy of its own
        except (OSError, ValueError, TypeError, LookupError, RuntimeError, SafetensorError) as error:
            raise _damaged(folder, error) from error
        for part in (part for member in members for part in member):
            for tensor in (*part.parameters(), *part.buffers()):
                # A copy: a tensor of a file is not aligned in memory as others are, and kernels may then round differently.
                tensor.data = tensor.data.clone()
            part.to(device)
        return cls(members, target, content["columns"], content.get("file_columns", ()))


def _damaged(folder: Path, error: Exception) -> DataError:
    return DataError(
        f"{folder}: a file of the predictor is missing or damaged ({' '.join(str(error).split())}); copy the whole folder again, "
        "or repeat the run"
    )


def _examples(contents: Sequence[Any], make: Callable[[Any], Any]) -> tuple[list[Any], list[str]]:
    """Return the examples that can be made, and for each entry the reason why there is none; empty if there is one."""
    examples, reasons = [], []
    for content in contents:
        try:
            examples.append(make(content))
            reasons.append("")
        except UnusableError as fault:
            reasons.append(fault.reason)
    return examples, reasons


def _place(folder: Path, index: int) -> Path:
    """Return the folder of a member."""
    return folder / f"member-{index + 1}" if index else folder


def model_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the folder of the predictor: the folder itself, or `model` in it.

    Raises:
        DataError: neither of them holds a predictor.
    """
    folder = Path(folder)
    for place in (folder, folder / MODEL):
        if (place / PREDICTOR).is_file():
            return place
    seeds = sorted(folder.glob(f"seed-*/{MODEL}/{PREDICTOR}"))
    remedy = f"give {seeds[0].parents[1]}" if seeds else "give the folder of a run's result"
    raise DataError(f"{folder} holds no predictor; {remedy}")


def describe(folder: Path) -> dict[str, Any]:
    """Return the description of a saved predictor.

    Raises:
        DataError: the file cannot be read, or another release wrote it.
    """
    file = folder / PREDICTOR
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file} is not JSON ({error}); save the predictor again") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(
            f'{file} does not describe a predictor: it lacks "format": "{_FORMAT}"; save the predictor again'
        )
    if content.get("version") != _VERSION:
        raise DataError(
            f"{file} has version {content.get('version')!r}, but this release reads version {_VERSION}; install the release "
            "that wrote it"
        )
    return content


def check_free(folder: Path) -> None:
    """Refuse a folder that holds something else than an earlier predictor.

    Raises:
        DataError: the folder is not free.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / PREDICTOR).is_file():
        raise DataError(f"{folder} holds files that are not a predictor; give another folder, or move them away")
