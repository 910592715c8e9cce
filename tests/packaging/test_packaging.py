"""Wheels, source distributions, clones, archives and editable installs hold the recipes; importing mlopt is light."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = ("clone", "source distribution", "wheel of a clone", "wheel of a source distribution")


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def failure(code: str) -> str:
    """Run code that fails, in the checkout; return its error."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 1
    return done.stderr


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build a distribution of a kind (`sdist`, `wheel`) from the sources in a folder."""
    # `--no-isolation`: hatchling comes from the dev group, not from an index.
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(folder), str(source))
    return next(folder.iterdir())


def copied(folder: Path) -> Path:
    """Copy the sources from the checkout, as in a clone or an archive."""
    for name in ("mlopt", "recipes"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore"):
        shutil.copy(ROOT / name, folder)
    return folder


def unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder to put on `sys.path` for each way to obtain mlopt."""
    folder = tmp_path_factory.mktemp("places")
    clone = copied(folder / "clone")
    with tarfile.open(build("sdist", clone, folder / "sdist")) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    source = next((folder / "unpacked").iterdir())
    of_clone, of_source = (
        unpacked(build("wheel", tree, folder / f"wheel-{tree.name}"), folder / f"installed-{tree.name}")
        for tree in (clone, source)
    )
    return dict(zip(PLACES, (clone, source, of_clone, of_source), strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_mlopt_contains_the_recipes(places: dict[str, Path], place: str, tmp_path: Path) -> None:
    code = """
    import importlib.resources, mlopt, mlopt.recipes
    data = importlib.resources.files("mlopt.recipes.tapweight.molecules") / "drugs.smi"
    print(mlopt.__file__, mlopt.recipes.TapWeight.__module__, data.is_file())
    """
    code = f"import sys; sys.path.insert(0, {str(places[place])!r})\n{textwrap.dedent(code)}"
    init = places[place] / "mlopt" / "__init__.py"
    printed = run(sys.executable, "-c", code, cwd=tmp_path).split()
    assert printed == [str(init), "mlopt.recipes.tapweight.recipe", "True"]


def test_wheels_contain_the_recipes_once_and_in_mlopt(places: dict[str, Path]) -> None:
    of_clone, of_sdist = (
        {str(path.relative_to(places[place])) for path in places[place].rglob("*") if path.suffix != ".pyc"}
        for place in ("wheel of a clone", "wheel of a source distribution")
    )
    assert of_clone == of_sdist
    assert "mlopt/py.typed" in of_clone
    folders = {name.partition("/")[0] for name in of_clone}
    assert folders == {"mlopt", *(name for name in of_clone if name.endswith(".dist-info"))}


def test_an_editable_install_contains_one_link_to_the_checkout(tmp_path: Path) -> None:
    """A copy of the recipes beside it would become stale."""
    code = f"from hatchling import build; build.build_editable({str(tmp_path)!r})"
    run(sys.executable, "-c", code, cwd=ROOT)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as archive:
        files = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert archive.read(*files).decode().strip() == str(ROOT)


def test_the_repository_contains_no_links() -> None:
    """Git without `core.symlinks`, and zip archives on Windows, turn links into text files."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git repository")
    modes = {line.split()[0] for line in run("git", "ls-files", "--stage", cwd=ROOT).splitlines()}
    assert modes
    assert "120000" not in modes


def test_recipes_cannot_be_imported_beside_mlopt() -> None:
    assert "import it as `mlopt.recipes`" in failure("import recipes")


def test_an_unknown_recipe_is_named() -> None:
    assert "cannot import name 'Tap'" in failure("from mlopt.recipes import Tap")


def test_importing_mlopt_needs_no_heavy_package() -> None:
    heavy = ("torch_geometric", "rdkit", "transformers", "torchopt", "sklearn", "matplotlib", "torchmetrics", "tyro")
    heavy += ("tensorboard", "wandb", "trackio", "mlflow")
    code = f"import mlopt, sys; print([name for name in {heavy!r} if name in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_importing_mlopt_imports_little_that_torch_does_not() -> None:
    """Compare modules, not seconds: seconds change with the load of the machine."""
    code = "import sys, torch; before = set(sys.modules); import mlopt; print(*set(sys.modules) - before)"
    modules = run(sys.executable, "-c", code).split()
    packages = {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names)
    # `_remote_module_non_scriptable` belongs to `torch.distributed.nn`.
    assert packages <= {"mlopt", "torch", "attr", "attrs", "rich", "safetensors", "_remote_module_non_scriptable"}
    # Each of these takes as long as all of mlopt.
    assert {"torch._dynamo", "torch._inductor", "torch.onnx", "torch.testing"}.isdisjoint(modules)


def test_the_example_of_the_readme_is_the_tested_one() -> None:
    example = (ROOT / "docs" / "examples" / "hyper_cleaning.py").read_text()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks[0].splitlines()) > 40
    assert blocks[0] in example


def test_hyper_cleaning_finds_the_corrupted_labels() -> None:
    """Run the example in a separate process, as a reader would."""
    output = run(sys.executable, str(ROOT / "docs" / "examples" / "hyper_cleaning.py"))
    area = float(re.search(r"'label is intact', by weight: ([\d.]+)", output)[1])  # type: ignore[index]
    plain, reweighted = map(float, re.search(r"([\d.]+) trained on all, ([\d.]+) reweighted", output).groups())  # type: ignore[union-attr]
    assert area > 0.9
    assert reweighted > plain + 0.05
