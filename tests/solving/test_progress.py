"""The progress of a run: a bar on a terminal, lines elsewhere, at times that a clock of the test sets."""

from __future__ import annotations

import io
import math
from types import SimpleNamespace

import pytest
from callback_cases import play
from rich.console import Console

import mlopt
from mlopt.durations import in_words
from mlopt.solving.callbacks import progress
from mlopt.testing import quadratic


def terminal(**options):
    return Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=200, **options)


def losses(*values):
    return [{"net/loss": value} for value in values]


class Clock:
    """A clock that stands still between steps."""

    def __init__(self):
        self.now = 1_000.0

    def __call__(self):
        return self.now


def lines(*runs, description="demo", shared=True):
    """Return the lines of runs without a terminal.

    Args:
        runs: the seconds that each step of each run takes.
        description: of the display.
        shared: one display for all runs, or one for each.
    """
    console, clock = Console(file=io.StringIO(), width=20), Clock()

    def made():
        return mlopt.ProgressDisplay(description, console, clock=clock)

    display = made()
    for seconds in runs:
        display = display if shared else made()
        run = SimpleNamespace(steps=len(seconds), step=0, status=None)
        display.on_train_begin(run)
        for duration in seconds:
            clock.now += duration
            run.step += 1
            display.on_step_end(run)
            display.on_log(run, [{"net/loss": 1 / run.step, "net/size": 7.0, "evaluation/loss": 3.0}])
        run.status = "completed"
        display.on_train_end(run)
    return console.file.getvalue().splitlines()


def test_a_bar_shows_steps_losses_and_the_last_evaluation():
    def drawn(rows):
        console = terminal(color_system=None)
        play(rows, lambda: mlopt.ProgressDisplay("demo", console))
        # The terminal is refreshed ten times a second; only its last state is certain.
        return " ".join([line for line in console.file.getvalue().splitlines() if "demo" in line][-1].split())

    rows = [
        {"net/loss": 0.5, "net/size": 7.0},
        {"net/loss": 0.25, "evaluation/loss": 0.125, "evaluation/acc": math.nan},
    ]
    assert drawn(rows).endswith("2/2 0:00:00 net 0.25 loss 0.125, acc nan")
    assert drawn([*rows, {"net/loss": 0.75}]).endswith("3/3 0:00:00 net 0.75 loss 0.125, acc nan")


def test_a_bar_of_a_resumed_run_starts_at_its_step():
    starts = []

    class Recording(mlopt.ProgressDisplay):
        def on_train_begin(self, run):
            super().on_train_begin(run)
            starts.append(self._progress.tasks[0].completed)

    console = terminal()
    play(losses(*range(5)), lambda: Recording("demo", console), save_at=3, killed_at=3)
    assert starts == [0, 3]


def test_progress_reads_no_row_between_logs():
    """The run here has no history."""
    watch = mlopt.ProgressDisplay("demo", terminal())
    run = SimpleNamespace(steps=3, step=0)
    watch.on_train_begin(run)
    for run.step in (1, 2, 3):
        watch.on_step_begin(run)
        watch.on_step_end(run)
    watch.on_log(run, [])
    watch.on_train_end(run)


def test_a_named_run_prints_a_line_after_five_seconds_then_one_a_minute_and_one_at_its_end():
    assert lines([1] * 4 + [20] * 8) == [
        "demo: step 5 of 12, 34 seconds left; net 0.25",  # 24 s for 5 steps: 7 x 4.8 s
        "demo: step 8 of 12, 42 seconds left; net 0.1429",  # 84 s for 8 steps: 4 x 10.5 s
        "demo: step 11 of 12, 13 seconds left; net 0.1",  # 144 s for 11 steps
        "demo: completed at step 12 of 12 after 3 minutes; net 0.08333",  # 164 s
    ]


def test_a_run_without_a_name_is_silent_for_a_minute():
    assert lines([5.9] * 10, description=None) == []
    assert lines([6.0] * 10 + [1.0], description=None) == [
        "solving: step 10 of 11, 6 seconds left; net 0.1111",
        "solving: completed at step 11 of 11 after 1 minute; net 0.09091",
    ]


def test_short_runs_print_a_line_a_minute_between_them():
    assert lines(*([[1.0, 1.5]] * 10)) == []
    assert lines(*([[1.0, 1.5]] * 30)) == ["demo: completed at step 2 of 2 after 2 seconds; net 0.5"]
    assert lines(*([[1.0, 1.5]] * 30), shared=False) == []


def test_lines_do_not_wrap_and_show_brackets_as_they_are():
    (line,) = lines([6.0], description="a [bold]long[/bold] name of a phase")
    assert line == "a [bold]long[/bold] name of a phase: completed at step 1 of 1 after 6 seconds; net 1"


def test_time_left_of_a_resumed_run_counts_its_own_steps():
    console, clock = Console(file=io.StringIO(), width=200), Clock()
    display = mlopt.ProgressDisplay("demo", console, clock=clock)
    run = SimpleNamespace(steps=100, step=90, status=None)
    display.on_train_begin(run)
    run.step, clock.now = 92, clock.now + 20.0
    display.on_step_end(run)
    assert console.file.getvalue() == "demo: step 92 of 100, 1 minute left\n"  # eight steps of ten seconds
    display.on_train_end(run)
    assert console.file.getvalue().splitlines()[1:] == ["demo: failed at step 92 of 100 after 20 seconds"]


@pytest.mark.parametrize("progress", [True, False])
def test_solve_without_a_terminal_prints_nothing_if_it_is_short(progress, capsys):
    mlopt.solve(quadratic("two", mlopt.Identity()).problem, 5, progress=progress)
    assert capsys.readouterr() == ("", "")


def test_solve_prints_to_standard_error_what_a_long_run_does(monkeypatch, capsys):
    monkeypatch.setattr(progress, "_INTERVAL", 0.0)
    mlopt.solve(quadratic("two", mlopt.Identity()).problem, 2)
    printed, lines = capsys.readouterr()
    assert (printed, [line.split(",")[0] for line in lines.splitlines()[:1]]) == ("", ["solving: step 1 of 2"])
    assert lines.splitlines()[1].startswith("solving: completed at step 2 of 2 after 1 second; ")
    assert len(lines.splitlines()) == 2
    mlopt.solve(quadratic("two", mlopt.Identity()).problem, 2, progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("widgets", "bar"), [(object(), True), (None, False)])
def test_a_notebook_with_widgets_shows_a_bar(widgets, bar, monkeypatch):
    monkeypatch.setattr(progress, "find_spec", lambda name: widgets if name == "ipywidgets" else None)
    assert progress._shows_bars(Console(file=io.StringIO(), force_jupyter=True)) is bar


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0, "1 second"),
        (1.4, "1 second"),
        (59.4, "59 seconds"),
        (59.5, "1 minute"),
        (89, "1 minute"),
        (91, "2 minutes"),
        (3_569, "59 minutes"),
        (3_571, "1 hour"),
        (90_000, "25 hours"),
    ],
)
def test_durations_are_rounded_to_a_whole_unit(seconds, words):
    assert in_words(seconds) == words
