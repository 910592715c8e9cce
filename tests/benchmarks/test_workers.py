"""Libraries in processes of their own: requests, answers, and messages about absent libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.hypergrad import table, workers
from benchmarks.hypergrad.sections import ladder, unroll
from benchmarks.hypergrad.worker import MOST
from benchmarks.hypergrad.workers import Absent, Library, Workplace

CASE = "quadratic, condition 10"


@pytest.fixture(scope="module")
def place() -> Iterator[Workplace]:
    """Return a workplace with mlopt alone: the Pythons of the other libraries do not exist."""
    nowhere = {name: "/nowhere/python" for name in workers.LIBRARIES if name != "mlopt"}
    with Workplace(nowhere, "cpu", True) as made:
        yield made


@pytest.fixture
def ours(place: Workplace) -> Library:
    library = place["mlopt"]
    assert library is not None
    library.result("load", file=place.case(CASE))
    return library


def test_an_estimator_is_built_and_compared_with_the_reference(ours: Library) -> None:
    ours.result("build", key="right", estimator="Dense", iterations=0)
    ours.result("build", key="crude", estimator="ConjugateGradient", iterations=1)
    assert ours.result("error", key="right")["error"] < 1e-8
    crude = ours.result("error", key="crude")
    assert 1e-3 < crude["error"] < 1
    assert crude["cosine"] < 1 - 1e-6


def test_more_iterations_cost_more_operations(ours: Library) -> None:
    for k in (2, 12, 22):
        ours.result("build", key=str(k), estimator="ConjugateGradient", iterations=k)
    few, some, many = (ours.result("cost", key=str(k))["flops"] for k in (2, 12, 22))
    assert many - some == some - few
    assert some - few >= 10 * 2 * 200 * 200  # one product with A per iteration


def test_every_call_is_timed(place: Workplace, ours: Library) -> None:
    ours.result("build", key="call", estimator="Identity", iterations=0)
    assert all(ratio > 0 for ratio in place.ratios([(ours, "plain"), (ours, "call")], 2))


def test_a_failure_is_answered_and_the_process_continues(ours: Library) -> None:
    answer = ours.ask("build", key="call", estimator="no such thing", iterations=0)
    assert answer["failed"].startswith("KeyError")
    with pytest.raises(RuntimeError, match="no such thing"):
        ours.result("build", key="call", estimator="no such thing", iterations=0)
    ours.result("build", key="call", estimator="Dense", iterations=0)
    assert ours.result("error", key="call")["error"] < 1e-8


def test_absent_libraries_are_listed_with_a_remedy(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    assert [library.name for library in place.libraries] == ["mlopt"]
    assert set(place.absent) == set(workers.LIBRARIES) - {"mlopt"}
    assert "make peers" in place.absent["torchopt"]
    assert "--peer hypertorch=PYTHON" in place.absent["hypertorch"]
    table.show_libraries({"mlopt": "1"}, place.absent)
    printed = capsys.readouterr().out
    assert all(name in printed for name in workers.LIBRARIES)


def test_a_python_without_the_library_is_absent(tmp_path: Path) -> None:
    with pytest.raises(Absent, match="ModuleNotFoundError"):
        Library("betty", sys.executable, "cpu")


def test_a_loop_pauses_and_reports(place: Workplace, ours: Library) -> None:
    ours.send("loop", setting="ConjugateGradient warm, rtol 1e-2", iterations=0, steps=4, every=2)
    assert ours.receive() == {"pause": 2}
    assert ours.go_on() == {"pause": 4}
    result = ours.go_on()["result"]
    assert result["seconds"] > 0
    assert result["error"] < 0.1


def test_mlopt_is_exact_on_every_rung_of_the_ladder(place: Workplace) -> None:
    library = place["mlopt"]
    assert library is not None
    rows = ladder._climb(library, "Dense", 60.0)
    assert [row["rungs"] for row in rows] == list(range(1, 9))
    assert all(row["error"] < 1e-8 for row in rows)


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="reads the limits of a process from Linux")
def test_the_memory_of_a_process_is_limited(ours: Library) -> None:
    limits = Path(f"/proc/{ours._process.pid}/limits").read_text().splitlines()
    (data,) = (line.split() for line in limits if line.startswith("Max data size"))
    assert int(data[3]) == MOST < 12 * 2**30


def test_each_library_unrolls_alone_in_a_process_that_ends(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together, the processes would fill the memory of the machine."""
    started: list[Library] = []

    def another(library: Library) -> Library:
        assert all(process._process.poll() is not None for process in started)
        started.append(Library(library.name, library.python, library.device))
        return started[-1]

    monkeypatch.setattr(Library, "another", another)
    monkeypatch.setattr(unroll, "CASE", CASE)
    rows = unroll.run(place)
    assert [row["iterations"] for row in rows] == [10, 30]
    assert rows[0]["error"] < 1e-12
    assert rows[0]["memory"] > 0
    assert rows[1]["time"] > rows[0]["time"]
    assert [process._process.poll() for process in started] == [0]
