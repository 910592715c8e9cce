"""Specifications of small problems that mix what misleads hypergradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import attrs
from hypothesis import strategies as st

__all__ = ["ALONE", "NESTED", "SHAPES", "LevelTraps", "Spec", "specs"]

SHAPES = {
    "two": {"outer": ("inner",), "inner": ("outer",)},
    "chain": {"outer": ("middle", "inner"), "middle": ("outer",), "inner": ("middle",)},
    "diamond": {"outer": ("middle", "inner"), "middle": ("outer",), "inner": ("middle", "outer")},
    "nested": {"outer": ("middle", "inner"), "middle": ("outer", "inner"), "inner": ("middle",)},
    "nested_referred": {"outer": ("inner",), "middle": ("outer", "inner"), "inner": ("outer", "middle")},
}
NESTED = ("nested", "nested_referred")
NORMS = ("layer_norm", "batch_norm", "batch_norm_eval", "group_norm", "instance_norm", "rms_norm")
ACTIVATIONS = ("tanh", "gelu", "silu", "softplus", "elu", "mish", "softmax")
BATCHES = ("tuple", "popped", "in_place", "popped_inside", "popped_list", "user_dict", "attribute", "item")


@attrs.frozen(kw_only=True)
class LevelTraps:
    """The traps of one level; the defaults are none."""

    optimizer: str = "sgd"
    decay: float = 0.0
    one_group: bool = True
    made: bool = False
    maximize: bool = False
    batch: str = "tuple"
    scale: float = 1.0
    stop: bool = False
    bound: bool = False
    frozen: bool = False
    hook: bool = False
    part: bool = False
    stop_outer: bool = False
    clip: float | None = None
    regularizer: bool = False
    eps: float = 1e-8
    factor: float = 1.0


@attrs.frozen(kw_only=True)
class Spec:
    """A problem: its shape, network, estimator and traps.

    Attributes:
        curvature: True if the Hessian is taken on curvature data, which are the level's own.
        mapping: True if losses return mappings.
        solved: True if the hypergradient is read off an outer step of `solve`.
        edge: an undeclared reference: the level, the level that it refers to, and how it gets there; None if all are declared.
        uneven: True if the first linear map of the network is in a unit of 1e-5.
        saddle: True if the inner level is at a saddle or a maximum.
    """

    seed: int = 0
    shape: str = "two"
    net: str = "linear"
    activation: str = "tanh"
    estimator: str = "dense"
    products: str = "autograd"
    middle: LevelTraps = LevelTraps()
    inner: LevelTraps = LevelTraps()
    outer_batch: str = "tuple"
    outer_scale: float = 1.0
    curvature: bool = False
    mapping: bool = False
    solved: bool = False
    edge: tuple[str, str, str] | None = None
    saddle: bool = False
    uneven: bool = False

    @property
    def traps(self) -> tuple[str, ...]:
        """The names of the traps that were drawn."""
        names = [] if self.net in ("linear", "mlp") else [self.net]
        names += ["undeclared " + self.edge[2]] if self.edge else []
        names += ["saddle"] if self.saddle else []
        names += ["uneven variables"] if self.uneven else []
        names += [f"outer: {self.outer_batch} batch"] if self.outer_batch != "tuple" else []
        names += ["outer: small variables"] if self.outer_scale < 1 else []
        for name in ("middle", "inner") if self.shape != "two" else ("inner",):
            traps = getattr(self, name)
            decay = "decoupled decay" if traps.optimizer == "adamw" else "decay"
            drawn = {
                decay: traps.decay > 0,
                "maximize": traps.maximize,
                f"{traps.batch} batch": traps.batch != "tuple",
                "small variables": traps.scale < 1,
                "large variables": traps.scale > 1,
                "scaled loss": traps.factor != 1,
                "stop-gradient": traps.stop,
                "bound": traps.bound,
                "frozen": traps.frozen,
                "hook": traps.hook,
                "optimiser of a part": traps.part,
                "stop-gradient of another": traps.stop_outer,
                "clip": traps.clip is not None,
            }
            names += [f"{name}: {trap}" for trap, given in drawn.items() if given]
        return tuple(names)


#: What a trap sets in a level, by name.
_SETTINGS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "decay": st.builds(
        lambda optimizer, decay, one_group: {"optimizer": optimizer, "decay": decay, "one_group": one_group},
        st.sampled_from(("sgd", "adam", "adamw", "rmsprop", "adagrad")),
        st.sampled_from((0.05, 0.3, 1.0)),
        st.booleans(),
    ),
    "maximize": st.just({"maximize": True}),
    "batch": st.sampled_from(BATCHES[1:]).map(lambda batch: {"batch": batch}),
    "size": st.sampled_from((1e-3, 1e-5, 1e-7, 1e4)).map(lambda scale: {"scale": scale}),
    "factor": st.sampled_from((1e-6, 1e6)).map(lambda factor: {"factor": factor}),
    "stop": st.just({"stop": True}),
    "bound": st.just({"bound": True}),
    "frozen": st.just({"frozen": True}),
    "hook": st.just({"hook": True}),
    "part": st.just({"part": True}),
    "stop outer": st.just({"stop_outer": True}),
    "clip": st.sampled_from((0.1, 1e-3)).map(lambda clip: {"clip": clip}),
}
#: Traps of a whole problem.
_WHOLE = ("edge", "saddle", "outer batch", "outer small", "uneven")
_NETS = ("linear", "linear", "mlp", "mlp", *NORMS, "weight_norm", "shared")


@st.composite
def specs(draw: st.DrawFn, shapes: Sequence[str]) -> Spec:
    """Draw a problem of one of these shapes, with up to three traps."""
    shape = draw(st.sampled_from(shapes))
    nested = shape in NESTED
    levels = ("inner",) if shape == "two" else ("middle", "inner")
    kinds = [(level, trap) for level in levels for trap in _SETTINGS] + [("problem", trap) for trap in _WHOLE]
    count = draw(st.sampled_from((0, 1, 1, 2, 2, 3)))
    traps = draw(st.lists(st.sampled_from(kinds), unique=True, min_size=count, max_size=count))
    settings: dict[str, dict[str, Any]] = {
        level: {
            "optimizer": draw(st.sampled_from(("sgd", "adam"))),
            "made": draw(st.booleans()),
            "regularizer": draw(st.booleans()),
            "eps": draw(st.sampled_from((1e-8, 1e-2))),
        }
        for level in levels
    }
    whole: dict[str, Any] = {"net": draw(st.sampled_from(_NETS))}
    for level, trap in traps:
        if level != "problem":
            settings[level] |= draw(_SETTINGS[trap])
        elif trap == "edge":
            owner = draw(st.sampled_from(levels))
            ref = draw(st.sampled_from(SHAPES[shape][owner]))
            whole["edge"] = (owner, ref, draw(st.sampled_from(("closure", "hidden", "default"))))
        elif trap == "outer batch":
            whole["outer_batch"] = draw(st.sampled_from(BATCHES[1:]))
        elif trap == "outer small":
            whole["outer_scale"] = draw(st.sampled_from((1e-3, 1e-5, 1e-7)))
        else:
            whole[trap] = True
    estimator = draw(st.sampled_from(("dense", "cg", "minres") if nested else ("dense", "cg", "minres", "unrolled")))
    # Adam moves at a fixed point: it divides rounding by rounding.
    at_rest = estimator != "unrolled" and all(options["optimizer"] == "sgd" for options in settings.values())
    return Spec(
        seed=draw(st.integers(0, 10_000)),
        shape=shape,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        estimator=estimator,
        products=draw(st.sampled_from(("autograd", "forward", "finite_difference"))),
        curvature=not nested and draw(st.booleans()),
        mapping=draw(st.booleans()),
        solved=at_rest and draw(st.booleans()),
        **{level: LevelTraps(**options) for level, options in settings.items()},
        **whole,
    )


def _in_inner(**options: Any) -> Spec:
    return Spec(net="mlp", inner=LevelTraps(**options))


#: Every trap alone, by name.
ALONE: dict[str, Spec] = {
    **{f"{norm}, nested": Spec(shape="nested", net=norm) for norm in NORMS},
    **{f"{norm}, nested, forward": Spec(shape="nested", net=norm, products="forward") for norm in NORMS[:2]},
    "weight_norm": Spec(net="weight_norm"),
    "weight_norm, nested": Spec(shape="nested", net="weight_norm"),
    "weight_norm, unrolled": Spec(net="weight_norm", estimator="unrolled"),
    "decay of SGD": _in_inner(decay=1.0),
    "decay of Adam": _in_inner(optimizer="adam", decay=0.3),
    "decay of some parameters": _in_inner(decay=0.3, one_group=False, made=True),
    "decay of AdamW": _in_inner(optimizer="adamw", decay=1.0, eps=1e-2),
    "decay of a middle level": Spec(shape="nested", middle=LevelTraps(decay=0.3)),
    "maximize": _in_inner(maximize=True),
    "maximize and decay": _in_inner(maximize=True, decay=0.3),
    **{
        f"an undeclared reference ({how}) of {owner} to {ref}, {shape}": Spec(shape=shape, edge=(owner, ref, how))
        for how in ("closure", "hidden", "default")
        for owner, ref, shape in (
            ("inner", "outer", "diamond"),
            ("outer", "middle", "chain"),
            ("middle", "inner", "nested"),
        )
    },
    **{
        f"a batch that a loss changes ({batch}), {products}": attrs.evolve(_in_inner(batch=batch), products=products)
        for batch in BATCHES[1:]
        for products in ("autograd", "finite_difference")
    },
    **{f"a batch that the outer loss changes ({batch})": Spec(net="mlp", outer_batch=batch) for batch in BATCHES[1:]},
    "negative curvature": Spec(net="linear", saddle=True, estimator="cg"),
    **{
        f"variables of size {scale:.0e}, {products}": attrs.evolve(_in_inner(scale=scale), products=products)
        for scale in (1e-3, 1e-5, 1e-7)
        for products in ("autograd", "finite_difference")
    },
    "clip, unrolled": attrs.evolve(_in_inner(clip=1e-3), estimator="unrolled"),
    "hook": _in_inner(hook=True),
    "hook and decay": _in_inner(hook=True, decay=0.3),
    "optimiser of a part": _in_inner(part=True),
    "decay of RMSprop": _in_inner(optimizer="rmsprop", decay=0.3),
    "decay and curvature data": attrs.evolve(_in_inner(decay=0.3), curvature=True),
    "stop-gradient of another level": _in_inner(stop_outer=True),
    "hook, forward": attrs.evolve(_in_inner(hook=True), products="forward"),
    "hook, unrolled": attrs.evolve(_in_inner(hook=True), estimator="unrolled"),
    "stop-gradient": _in_inner(stop=True),
    "stop-gradient, nested": Spec(shape="nested", middle=LevelTraps(stop=True)),
    # A doubt that only the multiplier of the middle level meets.
    "stop-gradient of another level, nested": Spec(
        shape="nested_referred",
        products="finite_difference",
        middle=LevelTraps(scale=1e-5, regularizer=True),
        inner=LevelTraps(stop_outer=True),
    ),
    "bound": _in_inner(bound=True),
    "frozen": _in_inner(frozen=True),
    "shared": Spec(net="shared"),
}
