"""Restored generators continue exactly as if nothing had been drawn."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
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
