"""The page on benchmarks and the README report the committed results."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine, memory, scale, scaling
from benchmarks.hypergrad.bar import MOST_TIME, bar
from benchmarks.hypergrad.repeats import runs_of
from benchmarks.tapweight import ablation, cost
from benchmarks.tapweight.ablation import ABLATIONS
from benchmarks.tapweight.results import regimes
from benchmarks.tapweight.rows import read
from benchmarks.tapweight.tables import markdown

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()
#: By modality: the rows of the study.
STUDIES = {
    name: read([ROOT / "benchmarks" / "results" / file])
    for name, file in {
        "molecules": "tapweight-molecules-2026-11-26.jsonl",
        "text": "tapweight-text-fresh-2026-11-27.jsonl",
    }.items()
}
#: The methods in the summary of the study.
SUMMARY = ("direct", "equal", "tapweight", "rehearsal")
SUMMARY_HEADER = (
    "| task | metric | direct finetuning | equal weights | TapWeight as published | TapWeight by rehearsal |"
)
SUMMARY_RULE = "|---|---|---:|---:|---:|---:|"
LIBRARIES = {
    "hypertorch": "hypertorch",
    "betty": "Betty 0.2.1",
    "betty_head": "Betty, repository",
    "torchopt": "TorchOpt",
    "boat": "BOAT",
    "mlopt": "mlopt",
}


def rows_of(file: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / file).read_text())["rows"]


def newest(name: str) -> Any:
    """Return the rows of the latest run of a benchmark."""
    return rows_of(max(file.name for file in (ROOT / "benchmarks" / "results").glob(f"{name}-20*.json")))


def table_of(text: str, header: str) -> list[list[str]]:
    """Return the cells of the rows below a header."""
    rows = text.split(f"{header}\n")[1].split("\n\n")[0].splitlines()[1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.3f} ({statistics.stdev(values):.3f})"


@pytest.fixture(scope="module")
def hypergrad() -> list[dict[str, Any]]:
    """Return the rows of the latest run, which has all sections."""
    rows: list[dict[str, Any]] = newest("hypergrad")
    assert {"accuracy", "loop", "identity", "unroll", "ladder", "multilevel"} <= {row["section"] for row in rows}
    return rows


@pytest.mark.parametrize(("text", "least"), [(PAGE, 13), (README, 4)])
def test_errors_and_costs_of_hypergradients_are_the_measured_ones(
    text: str, least: int, hypergrad: list[dict[str, Any]]
) -> None:
    table = table_of(text, "| | error, MLP | time | memory | error, transformer | time | memory |")
    assert len(table) >= least
    for name, *cells in table:
        library, estimator = name.split(": ")
        expected = []
        for case in ("MLP 784-256-10", "transformer"):
            (row,) = (
                row
                for row in hypergrad
                if (row["section"], row.get("case"), row.get("estimator")) == ("accuracy", case, estimator)
                and LIBRARIES.get(row["library"]) == library
                and row["iterations"] in (0, 10)
            )
            expected += [f"{row['error']:.1e}", f"{row['time']:.1f}", f"{row['memory']:.2f}"]
        assert cells == expected, name


def test_errors_and_costs_on_a_gpu_are_the_measured_ones() -> None:
    table = table_of(PAGE, "| | error | time | memory |")
    rows = [row for row in rows_of("hypergrad-cuda-2026-11-26.json") if row.get("case") == "MLP 64-256-10"]
    assert len(table) >= 8
    for name, *cells in table:
        (row,) = (
            row
            for row in rows
            if (row["section"], row["estimator"]) == ("accuracy", name) and row["iterations"] in (0, 10)
        )
        assert cells == [f"{row['error']:.1e}", f"{row['time']:.1f}", f"{row['memory']:.2f}"], name


def test_compiled_products_on_a_gpu_are_the_measured_ones() -> None:
    rows = {(row["case"], row["products"]): row for row in rows_of("compiled-cuda-2026-11-27.json")}
    header = "| | live: time | compiled: time | live / compiled | compiled: memory, MiB | live: memory, MiB |"
    expected = []
    for case in dict.fromkeys(case for case, _ in rows):
        live, compiled = rows[case, "live"], rows[case, "compiled"]
        memory = [f"{row['memory'] / 2**20:.2f}" for row in (compiled, live)]
        times = f"{live['time']:.1f}", f"{compiled['time']:.1f}", f"{compiled['live / this']:.2f}"
        expected.append([case, *times, *memory])
    assert table_of(PAGE, header) == expected


def test_the_scores_that_chose_the_text_plan_are_those_of_the_rows() -> None:
    rows = read([ROOT / "benchmarks" / "results" / "tapweight-text-development-2026-11-27.jsonl"])
    table = table_of(PAGE, "| method | passes | csabstruct | scicite | citation_intent |")
    methods = ("equal", "single:sentence_position", *(f"rehearsal:rehearsal_steps={n},rehearsals=1" for n in (50, 100)))
    assert len(table) == len(methods)
    for method, (_, passes, *cells) in zip(methods, table, strict=True):
        own = [row for row in rows if row["method"] == method]
        assert {row["budget"] for row in own} == {int(passes.replace(",", ""))}
        for task, cell in zip(("csabstruct", "scicite", "citation_intent"), cells, strict=True):
            scores = {row["seed"]: row["score"] for row in own if row["task"] == task}
            assert set(scores) == {0, 1}
            assert cell == f"{statistics.fmean(scores.values()):.3f}"


def test_targets_at_equal_iterations_are_the_measured_ones(hypergrad: list[dict[str, Any]]) -> None:
    figures = {target: figure for target, figure, _ in bar(hypergrad)}
    header = "| | CG, time | CG, memory | Neumann, time | Neumann, memory |"
    for number, kind in enumerate(("", " compiled")):
        table = table_of(header + PAGE.split(header)[number + 1], header)
        assert len(table) == 5
        for case, *cells in table:
            name = f"2 {{}}{kind}, 10 iterations, {case}: {{}} relative to the best equally accurate library <= {{:g}}"
            assert cells == [
                figures[name.format(family, cost, most)]
                for family, limits in MOST_TIME.items()
                for cost, most in (("time", limits[number]), ("memory", 1.0))
            ]


def test_the_other_targets_and_the_number_of_targets_met(hypergrad: list[dict[str, Any]]) -> None:
    checks = bar(hypergrad)
    other = [
        [target[2:], figure, "met" if met else "not met"]
        for target, figure, met in checks
        if not target.startswith("2 ")
    ]
    assert table_of(PAGE, "| | figure | |") == other
    met = sum(met is True for _, _, met in checks)
    assert f"mlopt meets {met} of the {len(checks)} targets" in README


def test_the_cost_of_solve() -> None:
    header = "| loop | `solve` / by hand | target: at most | |"
    printed = table_of("\n".join(engine.lines(newest("engine"))), header)
    assert [cells for _, *cells in table_of(PAGE, header)] == [cells for _, *cells in printed]
    assert {row[-1] for row in printed} <= {"met", "not met"}


def test_the_tables_of_growth_are_those_of_the_rows() -> None:
    section = PAGE.split("## How costs grow\n")[1].split("\n## ")[0]
    rows = newest("scale")
    assert [line for line in section.splitlines() if line.startswith("|")] == [
        line for line in scale.lines(rows) if line
    ]
    assert {row["table"] for row in rows} == {"variables", *scale.COLUMNS}
    nests = [row["products"] for row in rows if row["table"] == "nest"]
    assert nests[1] / nests[0] > 2  # products multiply with the depth of a nest


def test_the_page_lists_the_targets_that_were_repeated(hypergrad: list[dict[str, Any]]) -> None:
    header = "| target within 5% | run 1 | run 2 | run 3 | |"
    expected = [[target[2:], *figures, verdict] for target, figures, verdict in runs_of(hypergrad)]
    assert (table_of(PAGE, header) if header in PAGE else []) == expected


def summary(name: str) -> list[str]:
    """Return the rows of the summary of a study: a task, its metric, and the scores of four methods."""
    (regime,) = regimes(STUDIES[name])
    lines = []
    for task in regime.tasks:
        cells = []
        for method in SUMMARY:
            scores = [*regime.scores(method, task).values()]
            cells.append(spread(scores) + regime.differences(method)[task].mark if scores else "-")
        lines.append(f"| {task} | {regime.metrics[task]} | {' | '.join(cells)} |")
    return lines


@pytest.mark.parametrize("name", list(STUDIES))
def test_the_summary_of_the_study_is_that_of_its_rows(name: str) -> None:
    for line in summary(name):
        assert line in README.splitlines()
        assert line in PAGE.splitlines()


@pytest.mark.parametrize("name", list(STUDIES))
def test_the_tables_of_the_study_are_those_of_the_report(name: str) -> None:
    """The page may leave out tables of the report, but it changes none."""
    lines = [line for line in markdown(STUDIES[name]).splitlines() if line.startswith("|")]
    section = PAGE.split(f"## TapWeight: the study on {name}\n")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > 20
    assert set(shown) <= {*lines, *summary(name), SUMMARY_HEADER, SUMMARY_RULE}


def test_the_ablation_is_that_of_its_rows() -> None:
    rows = read([ROOT / "benchmarks" / "results" / "tapweight-molecules-length-2026-11-27.jsonl"])
    section = PAGE.split("## Ablation: one rehearsal")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert shown == [line for line in ablation.report(rows, ABLATIONS["length"]).splitlines() if line.startswith("|")]


@pytest.mark.parametrize(
    ("heading", "file", "least"),
    [
        ("TapWeight: molecules again, with two levels", "tapweight-molecules-repeat-2026-11-28.jsonl", 10),
        ("TapWeight: molecules by number of labels", "tapweight-molecules-labels-2026-11-28.jsonl", 30),
        ("TapWeight: molecules with full finetuning", "tapweight-molecules-full-2026-11-28.jsonl", 15),
        ("TapWeight: molecules on ten fresh seeds", "tapweight-molecules-fresh-2026-11-28.jsonl", 15),
        ("TapWeight: molecules with the customary split", "tapweight-molecules-usual-2026-11-28.jsonl", 15),
        ("An earlier text plan on ChemProt", "tapweight-text-2026-11-26.jsonl", 15),
    ],
)
def test_the_tables_of_a_further_study_are_those_of_the_report(heading: str, file: str, least: int) -> None:
    rows = read([ROOT / "benchmarks" / "results" / file])
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    shown = [line for line in section.splitlines() if line.startswith("|")]
    assert len(shown) > least
    assert set(shown) <= {line for line in markdown(rows).splitlines() if line.startswith("|")}


def test_the_cost_of_tapweight_is_the_measured_one() -> None:
    rows = rows_of("tapweight-cost-2026-11-26.json")
    printed = cost.markdown(rows["runs"], {int(every): ratio for every, ratio in rows["iteration"].items()})
    lines = [line for line in printed.splitlines() if line.startswith(("|", "An iteration"))]
    assert len(lines) == 15
    assert set(lines) <= set(PAGE.splitlines())


def test_every_measurement_in_a_table_of_the_readme_is_on_the_page() -> None:
    rows = [row for row in README.splitlines() if re.match(r"\|.*\d\.\d", row)]
    assert len(rows) > 10
    assert set(rows) <= set(PAGE.splitlines())
    assert len(README.splitlines()) < 150


def test_the_table_of_solutions_is_that_of_the_rows() -> None:
    rows = rows_of("solutions-2026-11-27.json")
    ours = {row["problem"]: row["seconds"] for row in rows if row["library"] == "mlopt"}
    order = {name: k for k, name in enumerate(ours)}
    expected = [
        [row["library"], str(row["lines"]), f"{row['error']:.0e}", f"{row['seconds'] / ours[row['problem']]:.2f}"]
        for row in sorted(rows, key=lambda row: order[row["problem"]])
    ]
    cells = table_of(PAGE, "| problem | library | lines | error | time |")
    assert [[library.lower(), *numbers] for _, library, *numbers in cells] == expected


def test_the_table_of_tasks_is_that_of_the_rows() -> None:
    page = (ROOT / "docs" / "tasks.md").read_text()
    cells = table_of(page, "| level of a task | tolerance | iterations, at once | iterations, apart | time ratio |")
    expected = [
        [row["rtol"], row["iterations together"], row["iterations apart"], f"{row['time ratio']:.2f}"]
        for row in rows_of("tasks-2026-11-27.json")
    ]
    assert [[float(rtol), int(at_once), int(apart), ratio] for _, rtol, at_once, apart, ratio in cells] == expected


def test_the_tables_of_scaling_are_those_of_the_counts() -> None:
    page = (ROOT / "docs" / "scaling.md").read_text()
    rows = rows_of("scaling-2026-11-27.json")
    assert "\n".join(scaling.lines(rows)[:6]) in page
    assert set(scaling.lines(rows)) <= set(page.splitlines())
    conjugate = rows[[row["estimator"] for row in rows].index("ConjugateGradient")]
    steps, k = scaling.INNER, scaling.ITERATIONS
    assert [conjugate[key] for key in ("inner vectors", "outer vectors", "sums")] == [steps + k + 2, 2, steps + k + 4]


def test_the_demonstration_under_two_kinds_of_kernels_is_that_of_the_rows() -> None:
    rows = rows_of("demo-kernels-2026-11-27.json")
    scores = {kernels: [row["test"] for row in rows if row["kernels"] == kernels] for kernels in ("default", "avx2")}
    titles = {"direct": "direct finetuning", "equal": "equal weights", "rehearsal": "TapWeight by rehearsal"}
    expected = [
        [title, *(spread([score[name] for score in scores[kernels]]) for kernels in scores)]
        for name, title in titles.items()
    ]
    assert table_of(PAGE, "| method | test RMSE, default kernels | test RMSE, AVX2 kernels |") == expected
    assert len(rows) == 10
    assert min(row["test"]["equal"] - row["test"]["rehearsal"] for row in rows) > 0.12
    assert all("polarity" in row["significant"] and "random_labels" not in row["significant"] for row in rows)


def test_the_table_of_memory_is_that_of_the_rows() -> None:
    rows = rows_of("memory-2026-11-27.json")
    assert "\n".join(memory.lines(rows)) in (ROOT / "docs" / "scaling.md").read_text()
    for row in rows:
        assert abs(row["estimated vectors"] / row["measured vectors"] - 1) < 0.15
