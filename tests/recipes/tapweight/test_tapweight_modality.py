"""The contract of a modality: a new one of a few lines has the whole command, and the existing ones keep the contract."""

from __future__ import annotations

import importlib
import json
import tomllib
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import attrs
import pytest
import torch
from tapweight_cases import F64, Encoder, Reconstruct, Sum

from mlopt.recipes.tapweight.command import command
from mlopt.recipes.tapweight.configuration import ConfigurationError, read, write
from mlopt.recipes.tapweight.modality import Configuration, LabelledData, Modality, objectives_field, objectives_option
from mlopt.recipes.tapweight.recipe import TapWeight
from mlopt.recipes.tapweight.settings import Settings

NAMES = ("linear", "square", "random_labels")
SMALL = ["--batch-size", "8", "--valid-batch-size", "8", "--epochs", "1", "--measurements", "2", "--steps", "4"]


@attrs.frozen(kw_only=True)
class Scaling:
    """The encoder.

    Args:
        factor: the factor of its weights.
    """

    factor: float = 1.0


@attrs.frozen(kw_only=True)
class VectorConfiguration(Configuration[LabelledData, Scaling]):
    """A whole run on vectors."""

    required: ClassVar[tuple[str, ...]] = ("output", "data.corpus")

    objectives: Annotated[tuple[str, ...], objectives_option(NAMES)] = objectives_field(NAMES)
    data: LabelledData = attrs.field(factory=LabelledData)
    settings: Settings = attrs.field(factory=Settings)
    encoder: Scaling = attrs.field(factory=Scaling)


class Vectors(Modality[VectorConfiguration]):
    name, extra, summary = "vectors", "vectors", "Pretrain on vectors."
    configuration_class = VectorConfiguration

    def read(self, say):
        self._rows = [torch.tensor(row, dtype=F64) for row in json.loads(self.configuration.data.corpus.read_text())]
        say(f"Corpus: {len(self._rows)} vectors.")

    def build(self, seed, device):
        torch.manual_seed(seed)
        encoder = Encoder()
        with torch.no_grad():
            encoder.layer.weight.mul_(self.configuration.encoder.factor)
        objectives = [Reconstruct(name, power) for power, name in enumerate(self.configuration.objectives)]
        splits = dict.fromkeys(("train", "valid", "test"), self._rows)
        return TapWeight(encoder, objectives, Sum(splits), self._rows, settings=self.configuration.settings, seed=seed)


main = partial(command, Vectors, prog="vectors")


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    (tmp_path / "corpus.json").write_text(json.dumps(torch.randn(24, 3).tolist()))
    return ["--corpus", str(tmp_path / "corpus.json"), "--train", "unused", "--output", str(tmp_path / "a"), *SMALL]


def test_a_new_modality_has_the_whole_command(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([*options, "--factor", "2", "--seeds", "0", "1", "--methods", "equal", "tapweight"])
    printed = capsys.readouterr().out
    assert printed.startswith("Corpus: 24 vectors.\n")
    assert "Task: Sum, scored by mse; examples: 24 train, 24 valid, 24 test." in printed
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert list(summary["scores"]) == ["equal", "tapweight"]
    assert list(summary["weights"]) == ["linear", "square"]
    saved = read(tmp_path / "a" / "seed-1" / "config.json", VectorConfiguration)
    assert (saved.encoder.factor, saved.seeds, saved.methods) == (2.0, (1,), ("equal", "tapweight"))
    main(["--config", str(tmp_path / "a" / "seed-1" / "config.json"), "--output", str(tmp_path / "b")])
    for name in ("weights.json", "scores.json", "history.csv"):
        assert (tmp_path / "a" / "seed-1" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_means_over_seeds_need_no_signals(options: list[str], tmp_path: Path) -> None:
    place = options.index("--valid-batch-size")
    options = [*options[:place], "--epochs", "1", "--steps", "4"]  # without those of methods that learn weights
    main([*options, "--seeds", "0", "1", "--methods", "direct", "single:square"])
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["weights"]["square"] == {"mean": 1.0, "std": 0.0}


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--dataset", "x"], "give either --train FILE"),
        (["--valid", "x"], "--valid is given without --test"),
        (["--objectives", "cube", "linear"], "there is no objective 'cube'; available: 'linear'"),
        (["--objectives", "linear"], "give at least two"),
        (["--methods", "single:cube"], "single:cube: 'cube' is not one of the objectives, linear, square"),
    ],
)
def test_every_modality_refuses_an_impossible_run(more: list[str], sentence: str, options: list[str]) -> None:
    with pytest.raises(ValueError, match=sentence):
        main([*options, *more])


@pytest.fixture(params=["molecules", "text"])
def modality(request: pytest.FixtureRequest) -> type[Modality]:
    return importlib.import_module(f"mlopt.recipes.tapweight.{request.param}.modality").main.args[0]


def test_a_modality_keeps_to_the_contract(modality: type[Modality], tmp_path: Path) -> None:
    folder = Path(importlib.import_module(modality.__module__).__file__).parent
    assert modality.name == folder.name
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert modality.extra in project["optional-dependencies"]
    assert modality.summary.endswith(".")
    configuration = modality.configuration_class()
    assert "random_labels" not in configuration.objectives
    assert attrs.evolve(configuration, objectives=("random_labels", *configuration.objectives))
    with pytest.raises(ConfigurationError, match="--output is missing"):
        configuration.check()
    whole = configuration.resolved(output=tmp_path, seeds=(3,), device="cpu")
    assert (whole.output, whole.seeds, whole.device) == (tmp_path, (3,), "cpu")
    write(whole, tmp_path / "config.json")
    assert read(tmp_path / "config.json", modality.configuration_class) == whole
