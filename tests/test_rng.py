"""Restored generators continue exactly as if nothing had been drawn."""

from __future__ import annotations

import random
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlopt.rng import GeneratorState, preserved

DRAWS = {
    "normal": lambda: np.random.normal(),  # drawn in pairs: the second is kept
    "rand": lambda: np.random.rand(),
    "integers": lambda: np.random.randint(1000, size=3).tolist(),
    "many": lambda: np.random.rand(700).sum(),  # past the end of the buffer, which is then filled again
    "torch": lambda: torch.rand(()).item(),
    "python": random.random,
    "seed": lambda: np.random.seed(3),
    "others": lambda: np.random.set_state(np.random.RandomState(5).get_state()),
}
STEPS = st.lists(
    st.sampled_from([*DRAWS]) | st.tuples(st.sampled_from(["capture", "restore", "preserve"]), st.integers(0, 3)),
    max_size=25,
)


def plain() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def put(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    np.random.set_state(state[2])


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, tail=st.lists(st.sampled_from([*DRAWS]), min_size=2, max_size=4))
def test_captures_in_any_order_match_plain_states(steps: list[Any], tail: list[str]) -> None:
    def play(capture: Any, restore: Any, preserve: Any) -> list[Any]:
        put(start)
        kept: dict[int, Any] = {}
        numbers = []
        for step in steps:
            if isinstance(step, str):
                numbers.append(DRAWS[step]())
            elif step[0] == "capture":
                kept[step[1]] = capture()
            elif step[0] == "restore" and step[1] in kept:
                restore(kept[step[1]])
            elif step[0] == "preserve":
                with preserve():
                    numbers.append(DRAWS["normal"]())
        return [*numbers, *(DRAWS[name]() for name in tail)]

    class PlainlyPreserved:
        def __enter__(self) -> None:
            self.state = plain()

        def __exit__(self, *_: object) -> None:
            put(self.state)

    start = plain()
    try:
        expected = play(plain, put, PlainlyPreserved)
        assert play(GeneratorState.capture, lambda state: state.restore(), preserved) == expected
    finally:
        put(start)


def test_another_numpy_bit_generator_is_captured_too() -> None:
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(1))
        with preserved():
            first = np.random.rand()
        assert np.random.rand() == first
    finally:
        np.random.set_bit_generator(before)


def test_a_state_survives_its_dictionary() -> None:
    np.random.normal()
    for state in (GeneratorState.capture(), GeneratorState.seeded(4)):
        again = GeneratorState.from_state_dict(state.state_dict())
        state.restore()
        first = [draw() for draw in DRAWS.values()]
        again.restore()
        assert [draw() for draw in DRAWS.values()] == first


def test_states_of_gpus_that_are_not_here_are_left_out() -> None:
    """A checkpoint may be read on a machine with fewer of them."""
    absent = 10_000
    captured = GeneratorState.capture().state_dict() | {"cuda": {absent: torch.zeros(16, dtype=torch.uint8)}}
    for state in ({"seed": 3, "cuda": [absent]}, captured):
        read = GeneratorState.from_state_dict(state)
        read.restore()
        assert len(read.state_dict()["cuda"]) == 0


def test_a_pending_normal_number_is_part_of_the_state() -> None:
    """The words of the generator are the same with and without it."""
    with preserved():
        np.random.seed(3)
        np.random.normal()
        np.random.normal()
        without = GeneratorState.capture()
        np.random.seed(3)
        np.random.normal()
        pending = GeneratorState.capture()
        expected = np.random.RandomState(3).normal(size=4)
        assert np.random.normal() == expected[1], "the capture took the number"
        pending.restore()
        assert np.random.normal(size=2).tolist() == expected[1:3].tolist()
        without.restore()
        assert np.random.normal() == expected[2]
        np.random.seed(3)
        np.random.normal()
        without.restore()
        assert np.random.normal() == expected[2], "a number that waited was left"
        assert not pending.same_as(without)


def test_a_capture_leaves_the_end_of_the_buffer_as_it_is() -> None:
    """The words are drawn in blocks of 624, and a look beyond the last one fills the next block."""
    with preserved():
        for used in (622, 623, 624, 625):
            np.random.seed(1)
            np.random.bytes(4 * used)
            for _ in range(3):
                GeneratorState.capture()
            plain_generator = np.random.RandomState(1)
            plain_generator.bytes(4 * used)
            assert np.random.normal(size=5).tolist() == plain_generator.normal(size=5).tolist()


class Accelerator:
    """A module such as torch.cuda, for devices whose generators count; `listed` as CUDA and XPU list theirs, MPS does not."""

    def __init__(self, count: int, *, listed: bool) -> None:
        self.states = [torch.tensor([100 + k]) for k in range(count)]
        if listed:
            self.default_generators = [Seeded(self, k) for k in range(count)]

    def device_count(self) -> int:
        return len(self.states)

    def get_rng_state(self, device: int) -> torch.Tensor:
        return self.states[device].clone()

    def set_rng_state(self, state: torch.Tensor, device: int) -> None:
        self.states[device] = state.clone()

    def manual_seed(self, seed: int) -> None:
        assert len(self.states) == 1
        self.states[0] = torch.tensor([seed])


class Seeded:
    def __init__(self, owner: Accelerator, index: int) -> None:
        self._owner, self._index = owner, index

    def manual_seed(self, seed: int) -> None:
        self._owner.states[self._index] = torch.tensor([seed])


@pytest.mark.parametrize(("kind", "count"), [("mps", 1), ("xpu", 2)])
def test_generators_of_every_accelerator_are_replayed(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    module = Accelerator(count, listed=kind != "mps")
    monkeypatch.setattr(torch, kind, module)
    last = torch.device(kind, count - 1)
    captured = GeneratorState.capture([last, torch.device("cpu"), torch.device("meta")])
    with preserved([last]):
        for index in range(count):
            module.states[index] += 1
    assert [int(state) for state in module.states] == [101 + k for k in range(count - 1)] + [99 + count]

    seeded = GeneratorState.seeded(7, [last])
    seeded.restore()
    assert int(module.states[-1]) == 7
    assert count == 1 or int(module.states[0]) == 101, "a device that is not in use was seeded"
    assert not GeneratorState.capture([last]).same_as(captured)

    for state in (captured, seeded):
        state.restore()
        expected = int(module.states[-1])
        read = GeneratorState.from_state_dict(state.state_dict())
        module.states[-1] += 1
        read.restore()
        assert int(module.states[-1]) == expected
        monkeypatch.setattr(torch, kind, Accelerator(0, listed=True))
        absent = GeneratorState.from_state_dict(state.state_dict())
        absent.restore()
        monkeypatch.setattr(torch, kind, module)


def test_threads_may_capture_and_restore_at_once() -> None:
    """They share one generator, so their numbers mix, but no call fails."""
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            state = GeneratorState.seeded(seed)
            for _ in range(100):
                with preserved(()):
                    state.restore()
                    np.random.normal()
        except BaseException as failure:
            failures.append(failure)

    before, interval = plain(), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
        put(before)
    assert not failures
