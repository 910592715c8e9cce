"""The command line: lists, refusals, exit codes; errors in the program keep their traceback."""

from __future__ import annotations

import compileall
import importlib
import importlib.metadata
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import attrs
import pytest
import torch

import mlopt
from mlopt import cli
from mlopt.recipes.tapweight.command_line import CommandLine
from mlopt.validation import at_least

if TYPE_CHECKING:
    from collections.abc import Callable


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd)


@pytest.fixture
def with_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Return a function that replaces `main` of every command."""

    def replace(main: Callable[..., object]) -> None:
        monkeypatch.setattr(cli, "_load", lambda command, prog: SimpleNamespace(main=main))

    return replace


def test_the_package_and_its_command_line_import_no_recipe() -> None:
    code = """
import sys, mlopt, mlopt.cli
heavy = ("mlopt.recipes", "tyro", "cattrs", "torch_geometric", "rdkit", "sklearn", "matplotlib", "transformers")
print([name for name in sys.modules if name.startswith(heavy)])
"""
    assert python("-c", code).stdout == "[]\n"


def test_python_m_mlopt_is_the_same_program() -> None:
    done = python("-m", "mlopt", "--version")
    version = importlib.metadata.version("mlopt-torch")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mlopt {version}\n", "")


def test_a_source_tree_runs_without_being_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == "mlopt not installed\n"


@pytest.mark.parametrize(("arguments", "listed"), [([], "tapweight"), (["tapweight"], "molecules")])
def test_the_help_lists_the_commands(arguments: list[str], listed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        cli.main([*arguments, "--help"])
    assert status.value.code == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"usage: {' '.join(['mlopt', *arguments])} [-h]")
    assert listed in printed.out
    assert printed.err == ""


_MODALITIES = "molecules, text, predict, embed, demo, demo-text"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "a command is missing after `mlopt`; give one of diagnose, derivatives, tapweight, or --help"),
        (["tapweight"], f"a command is missing after `mlopt tapweight`; give one of {_MODALITIES}, or --help"),
        (["tapwieght"], "`mlopt` has no command 'tapwieght'; did you mean `mlopt tapweight`?"),
        (
            ["tapweight", "molecule"],
            "`mlopt tapweight` has no command 'molecule'; did you mean `mlopt tapweight molecules`?",
        ),
        (
            ["Molecules", "--steps", "5"],
            "`mlopt` has no command 'Molecules'; did you mean `mlopt tapweight molecules`?",
        ),
        (["predcit"], "`mlopt` has no command 'predcit'; did you mean `mlopt tapweight predict`?"),
        (["tapweight", "xyz"], f"`mlopt tapweight` has no command 'xyz'; give one of {_MODALITIES}"),
        (
            ["tapweight", "--steps"],
            f"`mlopt tapweight` has no option --steps; give one of {_MODALITIES} before its options",
        ),
        (["--vers"], "`mlopt` has no option --vers; did you mean --version?"),
    ],
)
def test_unknown_commands_and_options_are_refused_with_the_nearest(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"mlopt: {sentence}\n")


def test_a_command_receives_its_arguments_unchanged(with_command: Any) -> None:
    received = []
    with_command(lambda arguments, prog: received.append((arguments, prog)))
    arguments = ["--labels", "a", "--help", "b", "--version", "--steps=3", "-x", "--seed", "-1"]
    assert cli.main(["tapweight", "molecules", *arguments]) == 0
    assert received == [(arguments, "mlopt tapweight molecules")]


@pytest.mark.parametrize("package", ["tyro", "rdkit"])
def test_a_missing_extra_is_named(package: str, tmp_path: Path) -> None:
    """tyro is imported with the command, RDKit when a molecule is read."""
    (tmp_path / "train.csv").write_text("smiles,y\nC,1\n")
    code = f"import sys; sys.modules[{package!r}] = None; from mlopt.cli import main; sys.exit(main(sys.argv[1:]))"
    files = ["--corpus", str(tmp_path / "train.csv"), "--train", str(tmp_path / "train.csv")]
    done = python("-c", code, "tapweight", "molecules", *files, "--output", str(tmp_path / "output"))
    assert done.returncode == 2
    assert f"needs {package}, which is not installed: pip install 'mlopt-torch[molecules]'\n" in done.stderr
    assert done.stderr.count("\n") == 1


@attrs.frozen
class Checked:
    count: int = attrs.field(validator=at_least(1))


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: Checked(0), "mlopt: Checked: count=0; it must be a whole number >= 1\n"),
        (lambda: mlopt.Problem(), "mlopt: "),
        (lambda: open("/nowhere/at all"), "mlopt: [Errno 2] No such file or directory: '/nowhere/at all'\n"),  # noqa: SIM115
    ],
)
def test_user_errors_print_one_sentence(
    act: Callable[[], object], sentence: str, with_command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with_command(lambda arguments, prog: act())
    assert cli.main(["tapweight", "molecules"]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(sentence)
    assert "Traceback" not in printed.err
    assert printed.out == ""


def test_user_errors_print_one_sentence_without_the_sources(tmp_path: Path) -> None:
    for folder in ("mlopt", "recipes"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(mlopt.__file__).parents[1] / folder, tmp_path / folder, ignore=ignored)
    compileall.compile_dir(tmp_path, legacy=True, quiet=2)
    for source in tmp_path.rglob("*.py"):
        source.unlink()
    code = """
import sys
from types import SimpleNamespace
from mlopt import cli
from mlopt.recipes.tapweight.recipe import Settings
assert cli.__file__.endswith("cli.pyc")
cli._load = lambda command, prog: SimpleNamespace(main=lambda arguments, prog: Settings(every=4).schedule(3))
sys.exit(cli.main(["diagnose"]))
"""
    done = python("-c", code, cwd=tmp_path)
    assert done.stderr.startswith("mlopt: steps=3 at every=")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def raise_here() -> None:
    raise ValueError("raised by something that is not mlopt")


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (raise_here, ValueError),
        (lambda: exec(compile("int('x')", cli.__file__, "exec")), ValueError),  # a call that fails inside mlopt
        (lambda: torch.nn.GroupNorm(2, 3), ValueError),
        (lambda: __import__("mlopt.nothing"), ModuleNotFoundError),
        (lambda: 1 / 0, ZeroDivisionError),
    ],
)
def test_program_errors_keep_their_traceback(
    act: Callable[[], object], kind: type[Exception], with_command: Any
) -> None:
    with_command(lambda arguments, prog: act())
    with pytest.raises(kind):
        cli.main(["tapweight", "molecules"])


def test_a_misspelt_import_in_mlopt_is_not_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    command = cli.Command("nothing", "mlopt.recipes.tapweight.nothing", "molecules")
    monkeypatch.setattr(cli, "_COMMANDS", {"tapweight": cli.Recipe("nothing", {"molecules": command})})
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'mlopt\.recipes\.tapweight\.nothing'"):
        cli.main(["tapweight", "molecules"])


def test_an_interruption_is_reported(with_command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: list[str], prog: str) -> None:
        raise KeyboardInterrupt

    with_command(main)
    assert cli.main(["tapweight", "molecules"]) == 130
    sentence = "mlopt: interrupted; progress since the last checkpoint is lost\n"
    assert capsys.readouterr().err == sentence


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--stepps 3", "mlopt: there is no option --stepps; did you mean --steps?"),
        ("--steps four", "--steps='four'; it must be a whole number"),
        ("--steps 0", "steps=0; it must be a whole number >= 1"),
        ("--gamma -1", "gamma=-1.0; it must be a finite number > 0"),
        ("--seeds 1 1", "seeds=[1, 1]; give at least one, and none twice"),
        ("--seed -1", "seeds are whole numbers from 0 to 4294967295"),
        ("--objectives masked_atom contrastive", "there is no objective 'masked_atom'; available: 'masked_atoms'"),
        (
            "--methods direct equals",
            "there is no method 'equals'; available: 'direct', 'equal', 'uncertainty',",
        ),
        ("--methods equal equal", "methods=['equal', 'equal']; give at least one, and none twice"),
        ("--corpus-limit 1", "--corpus-limit=1; it must be a whole number >= 2"),
    ],
)
def test_options_that_cannot_be_parsed_end_with_2(more: str, sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["tapweight", "molecules", *more.split()])
    except SystemExit as error:  # of tyro, which puts some errors into a box
        status = error.code
    assert status == 2
    assert sentence in " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())


@pytest.mark.parametrize("missing", ["corpus", "train", "output"])
def test_missing_required_options_are_named(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    required = {"corpus": "a.smi", "train": "a.csv", "output": "a"}
    given = [f"--{name}={value}" for name, value in required.items() if name != missing]
    assert cli.main(["tapweight", "molecules", *given]) == 2
    assert f"--{missing}" in capsys.readouterr().err


@pytest.mark.parametrize("modality", ["molecules", "text"])
def test_the_help_explains_every_option(
    modality: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as status:
        cli.main(["tapweight", modality, "--help"])
    assert status.value.code == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    modality_class = importlib.import_module(f"mlopt.recipes.tapweight.{modality}.modality").main.args[0]
    configuration = modality_class.configuration_class()
    sections = (configuration, configuration.data, configuration.settings, configuration.encoder)
    fields = [field for part in (CommandLine, *map(type, sections)) for field in attrs.fields(part)]
    structure = ("run", "data", "settings", "encoder")
    entries = re.split(r"\n\W{0,3}(?=--)", re.sub(r"\(default.*?\)", "", text, flags=re.DOTALL))
    for name in (field.name.replace("_", "-") for field in fields if field.name not in structure):
        described = [entry for entry in entries if re.match(rf"(--\S+( (\w+) \[\3 ...\])?, )?--{name}[\s,]", entry)]
        assert len(described) == 1, name
        words = re.findall(r"(?<![-{,])\b[a-z]{2,}\b", described[0])
        assert len(words) > 3, described
    assert re.findall(r"^\W*(\w+) options\W*$", text, re.MULTILINE) == ["data", "settings", "encoder"]
    assert all(name in text for name in (*configuration.objectives, "random_labels"))


def test_an_interrupted_run_ends_with_130(tmp_path: Path) -> None:
    molecules = [start + "C" * length for start in ("CC", "c1ccccc1", "N#C", "OC(=O)") for length in range(1, 11)]
    (tmp_path / "train.csv").write_text("\n".join(["smiles,y", *(f"{smiles},{len(smiles)}" for smiles in molecules)]))
    files = ["--corpus", "train.csv", "--train", "train.csv", "--split", "random", "--output", "output"]
    # If a shell runs the tests in the background, they and their children ignore SIGINT.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "import sys; from mlopt.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "tapweight", "molecules", *files, "--steps", "1000000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout
    try:
        assert process.stdout.readline() == "Corpus: 40 molecules of train.csv.\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    # While objectives are prepared there is nothing to save; during a phase, the run finishes and saves its step.
    unsaved = "mlopt: interrupted; progress since the last checkpoint is lost\n"
    assert error == unsaved or re.fullmatch(r"mlopt: SIGINT: step \d+ of 1000000 is finished and saved in .*\n", error)
    assert [entry.name for entry in (tmp_path / "output").iterdir()] in ([], ["checkpoints"])
