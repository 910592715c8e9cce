"""Checks on arguments."""

from __future__ import annotations

import math

import pytest

from mlopt.validation import is_positive, is_whole


@pytest.mark.parametrize(("value", "whole"), [(0, True), (-1, True), (True, False), (1.0, False), ("1", False)])
def test_a_whole_number_is_an_integer_and_not_a_bool(value: object, whole: bool) -> None:
    assert is_whole(value) is whole


def test_a_whole_number_may_have_a_least_value() -> None:
    assert [is_whole(value, 1) for value in (0, 1, 2)] == [False, True, True]


@pytest.mark.parametrize(
    ("value", "positive"),
    [
        (1, True),
        (1e-300, True),
        (0, False),
        (-1.0, False),
        (True, False),
        (math.inf, False),
        (math.nan, False),
        ("1", False),
    ],
)
def test_a_positive_number_is_finite_and_not_a_bool(value: object, positive: bool) -> None:
    assert is_positive(value) is positive
