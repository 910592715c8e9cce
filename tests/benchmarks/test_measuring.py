"""The memory tracker on allocations that are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.hypergrad.measuring import MemoryTracker, flops, peak_memory

KILO = 250  # float32 numbers in 1,000 bytes


def test_the_peak_counts_what_is_held_at_once() -> None:
    def allocate() -> None:
        first = torch.zeros(KILO)
        second = torch.zeros(2 * KILO)
        del first
        third = torch.zeros(4 * KILO)
        del second, third

    assert peak_memory(allocate, "cpu") == 6_000  # the second and the third


def test_views_and_what_is_written_in_place_count_once() -> None:
    with MemoryTracker() as tracker:
        held = torch.zeros(KILO)
        held.view(50, 5).t().add_(1.0)
        view = held[:10]
        del held
        assert tracker.live == 1_000
        del view
        assert tracker.live == 0
    assert tracker.peak == 1_000


def test_what_was_there_before_does_not_count() -> None:
    before = torch.ones(KILO)
    assert peak_memory(lambda: before.mul_(2.0), "cpu") == 0


@pytest.mark.parametrize("steps", [1, 5])
def test_a_graph_holds_what_backward_needs(steps: int) -> None:
    x = torch.ones(KILO, requires_grad=True)

    def graph() -> torch.Tensor:
        value = x
        for _ in range(steps):
            value = value.exp()  # each keeps its result
        return value

    assert peak_memory(graph, "cpu") == 1_000 * steps


def test_operations_of_a_matrix_product() -> None:
    assert flops(lambda: torch.zeros(2, 3) @ torch.zeros(3, 5)) == 2 * 2 * 3 * 5
