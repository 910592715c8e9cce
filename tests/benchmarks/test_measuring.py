"""The memory tracker on known allocations, and the commit of a result."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.hypergrad.measuring import flops, peak_memory, release

KILO = 250  # float32 numbers in 1,000 bytes


def test_the_peak_counts_tensors_alive_at_the_same_time() -> None:
    def allocate() -> None:
        first = torch.zeros(KILO)
        second = torch.zeros(2 * KILO)
        del first
        third = torch.zeros(4 * KILO)
        del second, third

    assert peak_memory(allocate, "cpu") == 6_000  # the second and the third


def test_views_and_in_place_results_count_once() -> None:
    def allocate() -> None:
        held = torch.zeros(KILO)
        held.view(50, 5).t().add_(1.0)
        view = held[:10]
        del held
        other = torch.zeros(KILO)
        del view, other

    assert peak_memory(allocate, "cpu") == 2_000  # the view holds the first


def test_memory_that_a_kernel_takes_for_itself_counts() -> None:
    out = torch.zeros(KILO)
    assert (
        peak_memory(lambda: torch.sort(out, descending=True, out=(out, torch.zeros(KILO, dtype=torch.long))), "cpu")
        >= 2_000
    )


def test_earlier_tensors_do_not_count() -> None:
    before = torch.ones(KILO)
    assert peak_memory(before.neg_, "cpu") == 0


def test_freeing_a_tensor_of_an_earlier_measured_call_does_not_lower_the_peak() -> None:
    held: list[torch.Tensor] = []
    assert peak_memory(lambda: held.append(torch.zeros(10 * KILO)), "cpu") == 10_000

    def replace() -> None:
        held.clear()
        torch.zeros(2 * KILO)

    assert peak_memory(replace, "cpu") == 2_000


@pytest.mark.parametrize("steps", [1, 5])
def test_tensors_saved_for_backward_count(steps: int) -> None:
    x = torch.ones(KILO, requires_grad=True)

    def graph() -> torch.Tensor:
        value = x
        for _ in range(steps):
            value = value.exp()  # each keeps its result
        return value

    assert peak_memory(graph, "cpu") == 1_000 * steps


def test_the_operations_of_a_matrix_product_are_counted() -> None:
    assert flops(lambda: torch.zeros(2, 3) @ torch.zeros(3, 5)) == 2 * 2 * 3 * 5


def test_the_commit_is_unknown_without_git(tmp_path: Path) -> None:
    code = "from benchmarks.report import environment; print(environment('cpu')['commit'])"
    variables = {**os.environ, "PATH": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "unknown\n"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads the resident memory from Linux")
def test_freed_memory_returns_to_the_system() -> None:
    """Small tensors of which every eighth stays alive: the heap cannot shrink, but its free pages can be returned."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    release()
    before = resident()
    held = [torch.ones(16 * 1024) for _ in range(1_600)]  # 100 MB in pieces of 64 KB
    held = held[::8]
    kept = resident()
    release()
    assert kept - before > 80
    assert resident() - before < 30
    del held
