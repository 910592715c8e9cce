"""What is shipped: a wheel, and a wheel from a source distribution, hold the recipes; importing mlopt is light."""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RECIPE = "mlopt/recipes/tapweight/recipe.py"
DATA = "mlopt/recipes/tapweight/molecules/drugs.smi"


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    # `--no-isolation`: hatchling comes from the dev group, not from an index.
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", str(folder), str(ROOT))
    source = next(folder.glob("*.tar.gz"))
    with tarfile.open(source) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    unpacked = next((folder / "unpacked").iterdir())
    run(
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--outdir",
        str(folder / "from-sdist"),
        str(unpacked),
    )
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder / "from-tree"), str(ROOT))
    return folder


@pytest.mark.parametrize("origin", ["from-sdist", "from-tree"])
def test_a_wheel_holds_the_recipes_once(built: Path, origin: str, tmp_path: Path) -> None:
    wheel = next((built / origin).glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert {RECIPE, DATA, "mlopt/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith("recipes/")]
    code = "import mlopt.recipes as r, mlopt; print(r.TapWeight.__module__, mlopt.__file__)"
    found = run(sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}", cwd=tmp_path)
    assert found.startswith("mlopt.recipes.tapweight.recipe")
    assert str(tmp_path) in found


def test_recipes_cannot_be_imported_beside_mlopt() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import recipes"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 1
    assert "import it as `mlopt.recipes`" in done.stderr


def test_an_unknown_recipe_is_named() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from mlopt.recipes import Tap"], capture_output=True, text=True, check=False
    )
    assert "cannot import name 'Tap'" in done.stderr


def test_importing_mlopt_needs_no_heavy_package() -> None:
    heavy = ("torch_geometric", "rdkit", "transformers", "torchopt", "sklearn", "matplotlib", "torchmetrics", "tyro")
    heavy += ("tensorboard", "wandb", "trackio", "mlflow")
    code = f"import mlopt, sys; print([name for name in {heavy!r} if name in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_importing_mlopt_takes_little_more_than_importing_torch() -> None:
    """Ratio of medians over alternating fresh processes, by the processes' own CPU time."""
    code = "import time; import {0}; print(time.process_time())"
    times: dict[str, list[float]] = {"torch": [], "mlopt": []}
    for _ in range(5):
        for name, seconds in times.items():
            seconds.append(float(run(sys.executable, "-c", code.format(name))))
    assert statistics.median(times["mlopt"]) < 1.5 * statistics.median(times["torch"])


def test_the_example_of_the_readme_is_the_one_that_is_tested() -> None:
    example = (ROOT / "docs" / "examples" / "hyper_cleaning.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks[0].splitlines()) > 40
    assert blocks[0] in example


def test_hyper_cleaning_finds_the_corrupted_labels() -> None:
    """In a process of its own, as a reader would run it."""
    output = run(sys.executable, str(ROOT / "docs" / "examples" / "hyper_cleaning.py"))
    area = float(re.search(r"'label is intact', by weight: ([\d.]+)", output)[1])  # type: ignore[index]
    plain, reweighted = map(float, re.search(r"([\d.]+) trained on all, ([\d.]+) reweighted", output).groups())  # type: ignore[union-attr]
    assert area > 0.9
    assert reweighted > plain + 0.05
