"""The rows of a process, its random numbers, and what is refused without a group."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mlopt
from mlopt.cli import main
from mlopt.problem.rows import Portion, portion, share_of_rows
from mlopt.ranks import Ranks, alone

Pair = namedtuple("Pair", ["x", "y"])


def level(**options: Any) -> mlopt.Level:
    return mlopt.Level("x", mlopt.variables(torch.ones(2)), lambda x, batch: x().sum(), **options)


@given(st.integers(1, 40), st.integers(1, 9))
def test_the_rows_of_all_processes_are_the_batch(count: int, size: int) -> None:
    parts = [share_of_rows(count, rank, size) for rank in range(size)]
    taken = [row for start, stop, share in parts if share for row in range(start, stop)]
    assert taken == list(range(count))
    assert sum(share for *_, share in parts) == pytest.approx(1.0)
    assert all(stop - start == 1 for start, stop, share in parts if not share)


def test_every_tensor_of_a_batch_is_split_and_the_rest_is_common() -> None:
    x = torch.arange(5)
    batch = {"x": x, "pair": Pair(x + 1, [x + 2]), "names": list("abcde"), "scale": torch.tensor(2.0), "flag": True}
    part = portion(level(), batch, Ranks(1, 2))
    assert part.share == 3 / 5
    assert part.batch["x"].tolist() == [2, 3, 4]
    assert isinstance(part.batch["pair"], Pair)
    assert part.batch["pair"].x.tolist() == [3, 4, 5]
    assert part.batch["pair"].y[0].tolist() == [4, 5, 6]
    assert part.batch["names"] == ["c", "d", "e"]
    assert (part.batch["scale"], part.batch["flag"]) == (2.0, True)


@pytest.mark.parametrize("options", [{"split": False}, {"data": None}])
def test_levels_that_are_not_split_have_the_whole_batch(options: dict[str, Any]) -> None:
    batch = None if "data" in options else torch.ones(5)
    part = portion(level(**options), batch, Ranks(1, 4))
    assert part.batch is batch
    assert part.share == 1 / 4


def test_processes_draw_numbers_of_their_own_and_go_on_with_common_ones() -> None:
    drawn, after = [], []
    for rank in (0, 1, 1):
        torch.manual_seed(0)
        with Portion("x", None, 0.5, Ranks(rank, 2), drawing=()).numbers():
            drawn.append(torch.rand(3))
        after.append(torch.rand(3))
    assert not torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[1], drawn[2])
    assert torch.equal(after[0], after[1])
    torch.manual_seed(0)
    assert not torch.equal(after[0], torch.rand(3)), "the next evaluation must draw other numbers"


def test_a_problem_without_a_group_under_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(mlopt.ProblemError, match=r"one of 2 processes .*init_process_group"):
        mlopt.Problem(level())
    assert not mlopt.Problem(level(), group=None).ranks.several
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not mlopt.Problem(level()).ranks.several


def test_other_commands_are_refused_under_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["tapweight", "predict"]) == 2
    assert "mlopt: `mlopt tapweight predict` runs in one process, and this is one of 2" in capsys.readouterr().err


def test_a_launcher_that_names_no_meeting_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert main(["tapweight", "molecules"]) == 2
    assert "mlopt: the 2 processes of the launcher cannot form a group" in capsys.readouterr().err


def test_problems_that_are_built_apart_belong_to_their_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with alone():
        assert not mlopt.Problem(level()).ranks.several
    with pytest.raises(mlopt.ProblemError, match="one of 2 processes"):
        mlopt.Problem(level())


def test_a_group_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(mlopt.ProblemError, match=r"group=.all., and torch\.distributed is not"):
        mlopt.Problem(level(), group="all")
