"""The tables of the study from rows made by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from study_cases import row, weighed

from benchmarks.tapweight import figures
from benchmarks.tapweight.figures import draw
from benchmarks.tapweight.plan import PLAIN
from benchmarks.tapweight.results import regimes
from benchmarks.tapweight.rows import Row, read
from benchmarks.tapweight.tables import markdown


def study() -> list[Row]:
    """Return three seeds on two tasks: rehearsal gains 1, 2 and 3 on esol; on bbbp the gains are +1, -1 and 0 tenths."""
    rows = []
    for seed, (gain, change) in enumerate(((1.0, 0.1), (1.2, -0.1), (1.1, 0.0))):
        rows += [row("direct", "esol", seed, 6.0 + seed), row("direct", "bbbp", seed, 0.5)]
        rows += [row("equal", "esol", seed, 5.0 + seed), row("equal", "bbbp", seed, 0.7)]
        learned = {"judged": True, "passes": 60, "seconds": 2.0 + seed, "memory": 512.0}
        esol: dict[str, Any] = {"weights": weighed(0.9 + seed / 100), "significant": {"useful": "helps"}, **learned}
        rows.append(row("rehearsal", "esol", seed, 5.0 + seed - gain, **esol))
        rows.append(row("rehearsal", "bbbp", seed, 0.7 + change, weights=weighed(0.4), **learned))
        rows += [row("single:useful", task, seed, score) for task, score in (("esol", 4.0 + seed), ("bbbp", 0.6))]
    return rows


def cells(text: str, first: str) -> list[str]:
    """Return the cells of the first row that begins with a name."""
    (line, *_) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_scores_have_spreads_marks_and_ranks() -> None:
    text = markdown(study())
    # Differences 1.0, 1.2, 1.1 have t = 1.1 / (0.1 / sqrt 3) = 19 and p = .003, twice that after Holm's correction.
    assert cells(text, "REHEARSAL") == ["**4.900 (0.954)** ▲", "**0.700 (0.100)**", "1.25"]
    assert cells(text, "EQUAL") == ["6.000 (1.000)", "**0.700 (0.000)**", "2.25"]
    # One worse on each seed by the same amount, and by .2 on bbbp.
    assert cells(text, "DIRECT") == ["7.000 (1.000) ▼", "0.500 (0.000) ▼", "4.00"]
    assert "over 3 seeds" in text
    assert "Mean rank over 2 tasks among all 4 methods" in text


def test_gains_have_their_p_values() -> None:
    text = markdown(study())
    assert "REHEARSAL against equal weights" in text
    # Of the changes +.1, -.1 and 0 on bbbp, t is 0. Three gains of one sign have p = 2 / 8 in the signed-rank test.
    assert cells(text, "esol") == ["+1.100", "3 of 3", "0.003", "0.250", "0.005"]
    assert cells(text, "bbbp") == ["+0.000", "1 of 3", "1.000", "1.000", "1.000"]
    assert "against equal weights: mean gain" not in markdown([own for own in study() if own["method"] != "equal"])


def test_single_objectives_are_in_a_table_of_their_own() -> None:
    scores, singles = markdown(study()).split("Each objective alone:")
    assert "| useful |" not in scores
    assert cells(singles, "useful") == ["**5.000 (1.000)** ▲", "0.600 (0.000) ▼", "2.50"]


@pytest.mark.parametrize("method", ["single:useful", "rehearsal", "equal", "direct"])
@pytest.mark.parametrize("seeds", [1, 3])
def test_rows_of_one_method_have_tables(method: str, seeds: int) -> None:
    text = markdown([own for own in study() if own["method"] == method and own["seed"] < seeds])
    assert cells(text, method.removeprefix("single:") if ":" in method else method.upper())[0].strip("*")[0].isdigit()


def test_weights_have_significance_and_the_share_of_the_control() -> None:
    text = markdown(study()).split("Weights of REHEARSAL")[1]
    assert cells(text, "useful") == ["0.910 (0.010); 3 of 3", "0.400 (0.000); 0 of 3"]
    assert cells(text, "random_labels (control)") == ["0.090 (0.010); 0 of 3", "0.600 (0.000); 0 of 3"]
    assert cells(text, "control / equal share") == ["0.180 (0.020)", "1.200 (0.000)"]
    assert cells(text, "correlation between seeds") == ["1.00", "1.00"]


def test_the_cost_is_that_of_the_longest_run() -> None:
    text = markdown(study()).split("Cost of adaptation")[1]
    assert cells(text, "REHEARSAL") == ["10", "60", "4.0", "512"]
    assert cells(text, "EQUAL") == ["10", "70", "1.5", "-"]


def test_the_costs_of_two_devices_stand_apart() -> None:
    rows = study()
    for own in rows:
        if own["method"] == "rehearsal" and own["seed"] == 2:
            own["environment"] = {"device": "GPU"}
    _, cpu, gpu = markdown(rows).split("Cost of adaptation")
    assert cells(cpu, "REHEARSAL") == ["10", "60", "3.0", "512"]
    assert cells(gpu, "REHEARSAL") == ["10", "60", "4.0", "512"]
    assert "EQUAL" in cpu
    assert "EQUAL" not in gpu.split("aim for")[0]


def test_the_aims_are_judged() -> None:
    text = markdown(study()).split("aim for REHEARSAL")[1]
    assert cells(text, "the first mean rank at equal budget") == ["1 of 4", "met"]
    assert cells(text, "significantly better than equal weights on at least half of the tasks") == ["1 of 2", "met"]
    assert cells(text, "significantly worse on none") == ["0 of 2", "met"]
    assert cells(text, "the control below a quarter of its share in 9 of 10 significant runs") == ["3 of 3", "met"]
    assert cells(text, "the control at most at its share in the other runs") == ["0 of 3", "missed"]
    assert cells(text, "weights of two seeds correlate at .7 on each task with a significant verdict") == [
        "1 of 1",
        "met",
    ]


def test_differences_pair_the_seeds_that_both_methods_have() -> None:
    rows = [own for own in study() if (own["method"], own["seed"]) != ("equal", 2)]
    (regime,) = regimes(rows)
    difference = regime.differences("rehearsal")["esol"]
    assert (difference.seeds, difference.wins, difference.gain) == (2, 2, pytest.approx(1.1))
    # t = 1.1 / (0.1 sqrt 2 / sqrt 2) = 11 with one degree of freedom: p = 1 - 2 atan(t) / pi.
    assert difference.p == pytest.approx(1 - 2 * math.atan(11) / math.pi)
    assert difference.adjusted == pytest.approx(2 * difference.p)
    assert difference.signed_rank == pytest.approx(0.5)


def test_regimes_are_apart_and_share_the_row_without_an_encoder() -> None:
    rows = [row(PLAIN, "bbbp", 0, 0.6), row("equal", "bbbp", 0, 0.7)]
    rows += [row("equal", "bbbp", 0, 0.8, finetuning="full"), row("equal", "bbbp", 0, 0.9, labels="all")]
    assert [(regime.title, regime.methods) for regime in regimes(rows)] == [
        ("molecules, 200 labels, ridge head on frozen features", (PLAIN, "equal")),
        ("molecules, 200 labels, finetuned as a whole", (PLAIN, "equal")),
        ("molecules, all labels, ridge head on frozen features", ("equal",)),
    ]


def test_numbers_of_labels_stand_beside_each_other() -> None:
    rows = [own | {"labels": "all", "score": own["score"] + 1} for own in study()] + study()
    rows += [
        own | {"labels": 50} for own in study() if own["method"] in ("direct", "rehearsal") and own["task"] == "esol"
    ]
    table, _, rest = markdown(rows).partition("\n\n##")
    header, _, *lines = [line for line in table.splitlines() if line.startswith("|")]
    # A method without rows for each number has no column, a task without rows for a number has no line.
    assert header == "| task | labels | DIRECT | REHEARSAL |"
    assert [line.split(" | ")[:2] for line in lines] == [
        ["| esol, rmse ↓", "50"],
        ["| esol, rmse ↓", "200"],
        ["| esol, rmse ↓", "all"],
        ["| bbbp, roc_auc ↑", "200"],
        ["| bbbp, roc_auc ↑", "all"],
    ]
    assert lines[1].split(" | ")[2:] == ["7.000 (1.000) ▼", "**4.900 (0.954)** ▲ |"]
    assert lines[2].split(" | ")[2:] == ["8.000 (1.000) ▼", "**5.900 (0.954)** ▲ |"]
    # Without equal weights there is nothing to compare with.
    assert lines[0].split(" | ")[2:] == ["7.000 (1.000)", "**4.900 (0.954)** |"]
    assert rest.count("\n## ") == 2


def test_a_method_that_lacks_a_task_has_no_rank() -> None:
    rows = [own for own in study() if (own["method"], own["task"]) != ("direct", "bbbp")]
    assert cells(markdown(rows), "DIRECT") == ["7.000 (1.000) ▼", "-", "-"]
    assert cells(markdown(rows), "EQUAL")[-1] == "2.25"


def test_every_figure_is_drawn(tmp_path: Path) -> None:
    rows = study() + [row("single:random_labels", task, 0, 1.0) for task in ("esol", "bbbp")]
    files = draw(rows, tmp_path / "figures")
    kinds = [file.name.partition("-molecules")[0] for file in files]
    assert kinds == ["ranks", "headroom", "weights-rehearsal"]
    assert all(file.stat().st_size > 10_000 for file in files)


def lines(axes: Any) -> list[tuple[list[float], float, str | None]]:
    """Return the ends of each line and the height and the colour of each point of an axes, but for the equal share."""
    drawn = [line for line in axes.get_lines() if line.get_label() != "equal share"]
    return [
        (
            [*map(float, line.get_xdata())],
            float(line.get_ydata()[0]),
            str(line.get_markerfacecolor()) if line.get_marker() == "o" else None,
        )
        for line in drawn
    ]


def test_each_weight_is_drawn_with_its_bootstrap_error() -> None:
    rows = study()
    for own in rows:
        if own["method"] == "rehearsal":
            own["weight_errors"] = {"useful": 0.25, "random_labels": 0.125}
    figure = figures.weights(regimes(rows)[0], "rehearsal")
    esol, bbbp = figure.axes
    assert [bar.get_width() for bar in esol.patches] == pytest.approx([0.91, 0.09])
    # Seeds with .90, .91 and .92 stand one below the other in a bar from -.4 to .4. A share ends at 0 and at 1.
    heights = [-0.8 / 3, 0.0, 0.8 / 3]
    expected = []
    for place, error, low, face in ((0, 0.25, 0.9, "tab:blue"), (1, 0.125, 0.1, "white")):
        for seed, height in enumerate(heights):
            weight = low + seed / 100 if place == 0 else low - seed / 100
            expected.append(([max(0.0, weight - error), min(1.0, weight + error)], place + height, None))
            expected.append(([weight], place + height, face))
    for line, (xs, y, face) in zip(lines(esol), expected, strict=True):
        assert (line[0], line[1]) == (pytest.approx(xs), pytest.approx(y))
        assert line[2] == face
    assert lines(bbbp)[0][0] == pytest.approx([0.4 - 0.25, 0.4 + 0.25])
    assert {face for _, _, face in lines(bbbp)} == {None, "white"}
    assert "with its bootstrap standard error" in figure.get_suptitle()


def test_rows_of_earlier_versions_have_no_errors_of_weights(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({k: v for k, v in own.items() if k != "weight_errors"}) + "\n" for own in study())
    )
    rows = read([file])
    assert rows == study()
    figure = figures.weights(regimes(rows)[0], "rehearsal")
    assert [ends for ends, _, face in lines(figure.axes[0]) if face is None] == [
        pytest.approx([weight, weight]) for weight in (0.9, 0.91, 0.92, 0.1, 0.09, 0.08)
    ]
    assert "bootstrap" not in figure.get_suptitle()


def test_the_subtitle_names_the_split_of_molecules_only() -> None:
    """Texts have official test files, whatever the option says."""
    for modality, beginning in {"molecules": "half of the groups as the test set, ", "text": ""}.items():
        (own,) = regimes([row("equal", "esol", 0, 1.0, modality=modality)])
        assert own.subtitle.startswith(f"{beginning}{row('equal', 'esol', 0, 1.0)['budget']:,} encoder passes")
