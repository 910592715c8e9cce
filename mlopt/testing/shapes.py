"""Shapes of multi-level problems, written out by hand: the references and the host of each level."""

from __future__ import annotations

from typing import TypeAlias

__all__ = ["SHAPES", "Shape", "ladder"]

#: For each level, outermost first: its host (None for the outermost) and the levels that its loss refers to. The hosts are
#: stated, not inferred, so a closed form built on them also checks the inference.
Shape: TypeAlias = dict[str, tuple[str | None, tuple[str, ...]]]


def ladder(rungs: int) -> Shape:
    """Return a ladder of diamonds, in which 2 ** rungs paths lead from the outermost level to the one nearest its data.

    `node_0` refers to the outermost level; `left_i` and `right_i` refer to `node_i`, and `node_{i+1}` to both of them.

    Args:
        rungs: number of diamonds, at least one.

    Returns:
        The shape, of 2 + 3 rungs levels.

    Example:
        >>> from mlopt.testing import ladder
        >>> list(ladder(1))
        ['outer', 'node_1', 'left_0', 'right_0', 'node_0']
    """
    shape: Shape = {"outer": (None, (f"node_{rungs}",))}
    for i in reversed(range(rungs)):
        shape[f"node_{i + 1}"] = ("outer", (f"left_{i}", f"right_{i}"))
        shape[f"left_{i}"] = ("outer", (f"node_{i}",))
        shape[f"right_{i}"] = ("outer", (f"node_{i}",))
    shape["node_0"] = ("outer", ("outer",))
    return shape


#: Shapes by name. In those called nested, a level that is pulled back has levels inside that its own loss refers to.
SHAPES: dict[str, Shape] = {
    "two": {"x": (None, ("y",)), "y": ("x", ("x",))},
    # A chain has two legal orders: a level listed after the one it refers to is solved inside it; listed before, beside it.
    "chain_of_three": {"x": (None, ("z",)), "y": ("x", ("x",)), "z": ("y", ("y",))},
    "chain_of_three_listed_backwards": {"x": (None, ("z",)), "z": ("x", ("y",)), "y": ("x", ("x",))},
    "chain_of_four": {"w": (None, ("z",)), "x": ("w", ("w",)), "y": ("x", ("x",)), "z": ("y", ("y",))},
    "chain_of_four_listed_backwards": {
        "w": (None, ("z",)),
        "z": ("w", ("y",)),
        "y": ("w", ("x",)),
        "x": ("w", ("w",)),
    },
    "chain_with_shortcuts": {"x": (None, ("y", "z")), "z": ("x", ("x", "y")), "y": ("x", ("x",))},
    "diamond": {
        "x": (None, ("left", "right")),
        "left": ("x", ("base",)),
        "right": ("x", ("base",)),
        "base": ("x", ("x",)),
    },
    "diamond_listed_backwards": {
        "x": (None, ("left", "right")),
        "base": ("x", ("x",)),
        "left": ("base", ("base",)),
        "right": ("base", ("base",)),
    },
    "ladder_of_two": ladder(2),
    "nested": {"x": (None, ("y",)), "y": ("x", ("x", "z")), "z": ("y", ("x", "y"))},
    "nested_without_shortcut": {"x": (None, ("y",)), "y": ("x", ("x", "z")), "z": ("y", ("y",))},
    "nested_and_referred_to": {"x": (None, ("y", "z")), "y": ("x", ("x", "z")), "z": ("y", ("x", "y"))},
    "nested_with_two_inside": {
        "x": (None, ("y", "right")),
        "y": ("x", ("x", "left", "right")),
        "right": ("y", ("left", "y")),
        "left": ("y", ("x", "y")),
    },
    "nested_beside_another": {
        "x": (None, ("user",)),
        "user": ("x", ("y", "x")),
        "y": ("x", ("x", "z")),
        "z": ("y", ("x", "y")),
    },
    "nested_and_looked_into": {
        "x": (None, ("user", "y")),
        "user": ("x", ("x", "z")),
        "y": ("x", ("z",)),
        "z": ("y", ("x", "y")),
    },
    "nested_twice": {
        "w": (None, ("x",)),
        "x": ("w", ("w", "y")),
        "y": ("x", ("x", "z")),
        "z": ("y", ("w", "y")),
    },
    "nested_twice_and_referred_to": {
        "w": (None, ("x", "z")),
        "x": ("w", ("w", "y", "z")),
        "y": ("x", ("x", "z")),
        "z": ("y", ("x", "y")),
    },
}
