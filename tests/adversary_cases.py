"""Small problems that mix what misleads hypergradients, each written twice: with modules for mlopt, and in primitives."""

from __future__ import annotations

import collections
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch
from adversary_oracle import Chain, Rule, Unsolved, predict
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, AdamW, Optimizer

import mlopt

__all__ = ["ALONE", "Case", "LevelTraps", "Spec", "Unsolved", "Verdict", "build", "specs", "verdict"]

SHAPES = {
    "two": {"outer": ("inner",), "inner": ("outer",)},
    "chain": {"outer": ("middle", "inner"), "middle": ("outer",), "inner": ("middle",)},
    "diamond": {"outer": ("middle", "inner"), "middle": ("outer",), "inner": ("middle", "outer")},
    "nested": {"outer": ("middle", "inner"), "middle": ("outer", "inner"), "inner": ("middle",)},
    "nested_referred": {"outer": ("inner",), "middle": ("outer", "inner"), "inner": ("outer", "middle")},
}
NORMS = ("layer_norm", "batch_norm", "batch_norm_eval", "group_norm", "instance_norm", "rms_norm")
ACTIVATIONS = ("tanh", "gelu", "silu", "softplus", "elu", "mish", "softmax")
BATCHES = ("tuple", "popped", "in_place", "popped_inside", "popped_list", "user_dict", "attribute", "item")
#: Kinds of batches whose loss doubles the inputs as it changes them.
DOUBLED = ("in_place", "attribute", "item")
UNROLLED_STEPS = 3


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
    clip: float | None = None
    regularizer: bool = False
    eps: float = 1e-8


@attrs.frozen(kw_only=True)
class Spec:
    """A problem: its shape, network, estimator and traps.

    Attributes:
        edge: an undeclared reference: the level, the level that it refers to, and how it gets there; None if all are declared.
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
    edge: tuple[str, str, str] | None = None
    saddle: bool = False

    @property
    def traps(self) -> tuple[str, ...]:
        """The names of the traps that were drawn."""
        names = [] if self.net in ("linear", "mlp") else [self.net]
        names += ["undeclared " + self.edge[2]] if self.edge else []
        names += ["saddle"] if self.saddle else []
        names += [f"outer: {self.outer_batch} batch"] if self.outer_batch != "tuple" else []
        for name in ("middle", "inner") if self.shape != "two" else ("inner",):
            traps = getattr(self, name)
            decay = "decoupled decay" if traps.optimizer == "adamw" else "decay"
            drawn = {
                decay: traps.decay > 0,
                "maximize": traps.maximize,
                f"{traps.batch} batch": traps.batch != "tuple",
                "small variables": traps.scale < 1,
                "stop-gradient": traps.stop,
                "bound": traps.bound,
                "frozen": traps.frozen,
                "hook": traps.hook,
                "clip": traps.clip is not None,
            }
            names += [f"{name}: {trap}" for trap, given in drawn.items() if given]
        return tuple(names)


#: What a trap sets in a level, by name.
_SETTINGS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "decay": st.builds(
        lambda optimizer, decay, one_group: {"optimizer": optimizer, "decay": decay, "one_group": one_group},
        st.sampled_from(("sgd", "adam", "adamw")),
        st.sampled_from((0.05, 0.3, 1.0)),
        st.booleans(),
    ),
    "maximize": st.just({"maximize": True}),
    "batch": st.sampled_from(BATCHES[1:]).map(lambda batch: {"batch": batch}),
    "small": st.sampled_from((1e-3, 1e-5, 1e-7)).map(lambda scale: {"scale": scale}),
    "stop": st.just({"stop": True}),
    "bound": st.just({"bound": True}),
    "frozen": st.just({"frozen": True}),
    "hook": st.just({"hook": True}),
    "clip": st.sampled_from((0.1, 1e-3)).map(lambda clip: {"clip": clip}),
}
#: Traps of a whole problem.
_WHOLE = ("norm", "weight_norm", "shared", "edge", "saddle", "outer batch")


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Draw a problem with up to three traps."""
    shape = draw(st.sampled_from(tuple(SHAPES)))
    nested = shape.startswith("nested")
    levels = ("inner",) if shape == "two" else ("middle", "inner")
    kinds = [(level, trap) for level in levels for trap in _SETTINGS] + [("problem", trap) for trap in _WHOLE]
    traps = draw(st.lists(st.sampled_from(kinds), unique=True, max_size=3))
    settings: dict[str, dict[str, Any]] = {
        level: {
            "optimizer": draw(st.sampled_from(("sgd", "adam"))),
            "made": draw(st.booleans()),
            "regularizer": draw(st.booleans()),
            "eps": draw(st.sampled_from((1e-8, 1e-2))),
        }
        for level in levels
    }
    whole: dict[str, Any] = {"net": draw(st.sampled_from(("linear", "mlp")))}
    for level, trap in traps:
        if level != "problem":
            settings[level] |= draw(_SETTINGS[trap])
        elif trap == "norm":
            whole["net"] = draw(st.sampled_from(NORMS))
        elif trap == "edge":
            owner = draw(st.sampled_from(levels))
            ref = draw(st.sampled_from(SHAPES[shape][owner]))
            whole["edge"] = (owner, ref, draw(st.sampled_from(("closure", "hidden", "default"))))
        elif trap == "outer batch":
            whole["outer_batch"] = draw(st.sampled_from(BATCHES[1:]))
        else:
            whole |= {"net": trap} if trap != "saddle" else {"saddle": True}
    return Spec(
        seed=draw(st.integers(0, 10_000)),
        shape=shape,
        activation=draw(st.sampled_from(ACTIVATIONS)),
        estimator=draw(st.sampled_from(("dense", "cg", "minres") if nested else ("dense", "cg", "minres", "unrolled"))),
        products=draw(st.sampled_from(("autograd", "forward", "finite_difference"))),
        **{level: LevelTraps(**options) for level, options in settings.items()},
        **whole,
    )


class Net(nn.Module):
    """A small network with linear maps in a unit of `scale`."""

    def __init__(self, kind: str, activation: str, scale: float, frozen: bool) -> None:
        super().__init__()
        self.kind, self.scale = kind, scale
        wide, affine = kind in ("group_norm", "instance_norm"), scale == 1.0 and kind not in ("group_norm", "instance_norm")
        h = 6 if wide else 1 if kind == "linear" else 3
        self.first = nn.Linear(2, h, bias=not wide)
        names = {"gelu": nn.GELU, "silu": nn.SiLU, "softplus": nn.Softplus, "elu": nn.ELU, "mish": nn.Mish, "tanh": nn.Tanh}
        self.activation = nn.Softmax(dim=-1) if activation == "softmax" else names[activation]()
        norms: dict[str, Callable[[], nn.Module]] = {
            "layer_norm": lambda: nn.LayerNorm(h, elementwise_affine=affine),
            "batch_norm": lambda: nn.BatchNorm1d(h, affine=affine),
            "batch_norm_eval": lambda: nn.BatchNorm1d(h, affine=affine),
            "group_norm": lambda: nn.GroupNorm(2, h, affine=affine),
            "instance_norm": lambda: nn.InstanceNorm1d(2, affine=affine),
            "rms_norm": lambda: nn.RMSNorm(h, elementwise_affine=affine),
        }
        self.norm = norms[kind]() if kind in norms else nn.Identity()
        if kind == "batch_norm_eval":
            self.norm.eval()
            self.norm.running_mean.fill_(0.3)
            self.norm.running_var.fill_(1.7)
        if kind == "shared":
            self.body = nn.Linear(3, 3, bias=False)
            self.again = self.body
        if kind != "linear":
            self.last = nn.Linear(h, 1)
        self.double()
        if kind == "weight_norm":
            nn.utils.parametrizations.weight_norm(self.first)
        if frozen:
            (self.first.weight if kind in ("shared", "group_norm", "instance_norm") else self.first.bias).requires_grad_(False)

    def _linear(self, layer: nn.Linear, h: Tensor) -> Tensor:
        if self.scale == 1.0:
            return layer(h)
        return functional.linear(h, layer.weight / self.scale, None if layer.bias is None else layer.bias / self.scale)

    def forward(self, inputs: Tensor) -> Tensor:
        h = self._linear(self.first, inputs)
        if self.kind == "linear":
            return h.squeeze(1)
        h = self.norm(h.unflatten(1, (2, -1))).flatten(1) if self.kind == "instance_norm" else self.norm(h)
        h = self.activation(h)
        if self.kind == "shared":
            h = self.activation(self._linear(self.again, self.activation(self._linear(self.body, h))))
        return self._linear(self.last, h).squeeze(1)


class Vector(nn.Module):
    """Three variables, in a vector and a scalar, in a unit of `scale`."""

    def __init__(self, value: Tensor, scale: float = 1.0, frozen: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(scale * value[:2]), nn.Parameter(scale * value[2])
        self.second.requires_grad_(not frozen)
        self.scale = scale

    def forward(self) -> Tensor:
        return torch.cat([self.first, self.second.reshape(1)]) / self.scale


class Projected(SGD):
    """Steps of SGD, then a projection of one variable."""

    def __init__(self, parameters: Any, *, bounds: tuple[float, float], **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self._bounds = bounds

    def step(self, closure: Any = None) -> None:
        super().step(closure)
        with torch.no_grad():
            self.param_groups[0]["params"][0].view(-1)[0].clamp_(*self._bounds)


class Record:
    """A batch with attributes."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels


def wrap(kind: str, inputs: Tensor, labels: Tensor) -> Any:
    """Return a batch of a kind."""
    both = {"inputs": inputs.clone(), "labels": labels.clone()}
    kinds: dict[str, Callable[[], Any]] = {
        "popped": lambda: both,
        "popped_inside": lambda: {"data": [both]},
        "popped_list": lambda: [*both.values()],
        "user_dict": lambda: collections.UserDict(both),
        "attribute": lambda: Record(**both),
        "item": lambda: both,
    }
    return kinds.get(kind, lambda: tuple(both.values()))()


def read(kind: str, batch: Any) -> tuple[Tensor, Tensor]:
    """Return inputs and labels, and change the batch on the way, as its kind does."""
    if kind in ("popped", "user_dict"):
        labels = batch.pop("labels")
        return batch["inputs"], labels
    if kind == "popped_inside":
        labels = batch["data"][0].pop("labels")
        return batch["data"][0]["inputs"], labels
    if kind == "popped_list":
        labels = batch.pop()
        return batch[0], labels
    if kind == "attribute":
        batch.inputs = 2 * batch.inputs
        return batch.inputs, batch.labels
    if kind == "item":
        batch["inputs"] = 2 * batch["inputs"]
        return batch["inputs"], batch["labels"]
    if kind == "in_place":
        batch[0].mul_(2)
    return batch


class Case:
    """A problem on modules at the fixed point of its primitives, or where the unrolled steps start.

    Attributes:
        problem: the problem for mlopt.
        expected: the hypergradient from primitives, (3,).

    Raises:
        Unsolved: there is no fixed point near the start.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(spec.seed), dtype=torch.float64)
        self._s = draw(6)
        self._data = {name: (draw(6, 2), 0.5 * draw(6)) for name in SHAPES[spec.shape]}
        self._modules: dict[str, nn.Module] = {"outer": Vector(0.5 * draw(3))}
        if "middle" in SHAPES[spec.shape]:
            self._modules["middle"] = Vector(0.5 * draw(3), spec.middle.scale, spec.middle.frozen)
        self._modules["inner"] = self._net(draw)
        self._start = {name: p.detach().clone() for name, p in self._modules["inner"].named_parameters()}
        self._free = {name: _trainable(module) for name, module in self._modules.items()}
        self._unrolled = spec.estimator == "unrolled"
        self.oracle = self._primitives()
        if self._unrolled:
            self._bounds = {name: (float(self._flat(name)[0]), float("inf")) for name in self._free}
            self.expected = self.oracle.unrolled(UNROLLED_STEPS, self._bounds)
        else:
            self.oracle.settle()
            self._bounds = {name: self._bound(name) for name in self._free if name != "outer"}
            self.expected = self.oracle.gradient()
            for name, values in (("middle", self.oracle.b), ("inner", self.oracle.z)):
                if name in self._free:
                    nn.utils.vector_to_parameters(values, list(self._free[name].values()))
        self.problem = mlopt.Problem(*(self._level(name) for name in SHAPES[spec.shape]))

    def _net(self, draw: Callable[..., Tensor]) -> Net:
        spec = self.spec
        net = Net(spec.net, spec.activation, spec.inner.scale, spec.inner.frozen)
        for p in net.parameters():
            p.data = (1.0 if p.dim() > 1 else 0.3) * draw(*p.shape) * spec.inner.scale
        for name, p in net.named_parameters():
            if name == "norm.weight" or name.endswith("original0"):
                p.data = p.data / spec.inner.scale * 0.3 + 1.0 if name == "norm.weight" else p.data.abs() + spec.inner.scale
        return net

    def _flat(self, name: str) -> Tensor:
        return nn.utils.parameters_to_vector(list(self._free[name].values())).detach().clone()

    def _traps(self, name: str) -> LevelTraps:
        return self.spec.middle if name == "middle" else self.spec.inner

    # The objectives in primitives.

    def _primitives(self) -> Chain:
        shape, nested = self.spec.shape, self.spec.shape.startswith("nested")
        middle = "middle" in self._free
        return Chain(
            outer=self._outer_value,
            middle=self._middle_value if middle else None,
            inner=self._inner_value,
            rules={name: self._rule(name) for name in self._free if name != "outer"},
            a=self._flat("outer"),
            b=self._flat("middle") if middle else torch.zeros(0, dtype=torch.float64),
            z=self._flat("inner"),
            nested=nested and "inner" in SHAPES[shape]["middle"],
        )

    def _rule(self, name: str) -> Rule:
        traps, x = self._traps(name), self._flat(name)
        decay = torch.full_like(x, traps.decay)
        if not traps.one_group:
            decay[next(iter(self._free[name].values())).numel() :] = 0.0
        kind = "sgd" if traps.bound else traps.optimizer
        apart = kind == "adamw"
        moved, free = torch.ones_like(x, dtype=torch.bool), torch.ones_like(x, dtype=torch.bool)
        moved[1], free[0] = not traps.hook, not traps.bound
        return Rule(
            sign=-1.0 if traps.maximize else 1.0,
            decay=torch.zeros_like(x) if apart else decay / traps.scale**2,
            decoupled=0.3 * decay if apart else torch.zeros_like(x),
            kind=kind,
            lr=0.1 * traps.scale**2 if kind == "sgd" else 0.05 * traps.scale,
            momentum=0.5,
            eps=traps.eps,
            clip=None if traps.clip is None else traps.clip / traps.scale,
            moved=moved,
            free=free,
        )

    def _outputs(self, z: Tensor, inputs: Tensor) -> Tensor:
        return predict(self.spec.net, self.spec.activation, self.spec.inner.scale, self._named(z), inputs)

    def _named(self, z: Tensor) -> dict[str, Tensor]:
        named, at = dict(self._start), 0
        for name, p in self._free["inner"].items():
            named[name], at = z[at : at + p.numel()].reshape(p.shape), at + p.numel()
        return named

    def _whole(self, b: Tensor) -> Tensor:
        scale = self.spec.middle.scale
        if self.spec.middle.frozen:
            b = torch.cat([b, self._modules["middle"].second.detach().reshape(1)])
        return b / scale

    def _batch(self, name: str) -> tuple[Tensor, Tensor]:
        kind = self.spec.outer_batch if name == "outer" else self._traps(name).batch
        inputs, labels = self._data[name]
        return (2 * inputs if kind in DOUBLED else inputs), labels

    def _outer_value(self, a: Tensor, b: Tensor, z: Tensor) -> Tensor:
        inputs, labels = self._batch("outer")
        value = (self._outputs(z, inputs) - labels).square().mean() + torch.sin(a).sum() / 10
        return value + 0.3 * self._whole(b).square().sum() if "middle" in SHAPES[self.spec.shape]["outer"] else value

    def _middle_value(self, b: Tensor, stopped: Tensor, a: Tensor, z: Tensor) -> Tensor:
        traps, (inputs, labels) = self.spec.middle, self._batch("middle")
        b, stopped = self._whole(b), self._whole(stopped)
        value = (b**4).sum() / 4 - b @ torch.tanh(a) + (inputs.square().mean() + labels.mean()) * b.sum() / 10
        value = value + b.square().sum()
        if traps.stop:
            value = value + (b - 0.4 * stopped - 0.1).square().sum() / 2
        if self.spec.shape.startswith("nested"):
            value = value + (self._outputs(z, inputs) - labels).square().mean() / 2
        return -value if traps.maximize else value

    def _inner_value(self, z: Tensor, stopped: Tensor, a: Tensor, b: Tensor) -> Tensor:
        traps, (inputs, labels) = self.spec.inner, self._batch("inner")
        refers = SHAPES[self.spec.shape]["inner"]
        c = self._whole(b) + (0.3 * a if "outer" in refers else 0.0) if "middle" in refers else a
        labels = labels + c[2] * self._s + (0.4 * self._outputs(stopped, inputs) if traps.stop else 0.0)
        fit = ((1 + torch.tanh(c[0] + self._s * c[1])) * (self._outputs(z, inputs) - labels).square()).mean()
        named = self._named(z)
        anchor = sum(((named[k] - self._start[k]) / traps.scale).square().sum() for k in self._free["inner"])
        value = fit + self._strength * anchor
        return -value if traps.maximize else value

    @property
    def _strength(self) -> float:
        return -0.7 if self.spec.saddle else 0.4

    def _bound(self, name: str) -> tuple[float, float]:
        if not self._traps(name).bound:
            return float("-inf"), float("inf")
        held = float(self._flat(name)[0])
        push = float(self.oracle.push(name)[0]) * self._traps(name).scale
        if abs(push) < 1e-3:
            raise Unsolved
        return (held, float("inf")) if push > 0 else (float("-inf"), held)

    # The same with modules.

    def _level(self, name: str) -> mlopt.Level:
        loss = {"outer": self._outer_loss, "middle": self._middle_loss, "inner": self._inner_loss}[name]
        module, data = self._modules[name], [wrap(self._kind(name), *self._data[name])]
        if name == "outer":
            return mlopt.Level(name, module, self._declared(name, loss), data=data, optimizer=partial(SGD, lr=0.1))
        traps = self._traps(name)
        if traps.hook:
            first = next(iter(self._free[name].values()))
            mask = torch.ones(first.numel(), dtype=torch.float64)
            mask[1] = 0.0
            first.register_hook(lambda g: g * mask.reshape(g.shape))
        regularizer = {"middle": self._middle_regularizer, "inner": self._inner_regularizer}[name]
        optimizer = partial(self._optimizer, name)
        return mlopt.Level(
            name,
            module,
            self._declared(name, loss),
            data=data,
            optimizer=optimizer(module.parameters()) if traps.made else optimizer,
            clip=traps.clip if traps.clip is None else traps.clip / traps.scale,
            estimator=self._estimator(),
            regularizer=regularizer if traps.regularizer else None,
        )

    def _kind(self, name: str) -> str:
        return self.spec.outer_batch if name == "outer" else self._traps(name).batch

    def _estimator(self) -> mlopt.Estimator:
        products = self.spec.products
        options: dict[str, Any] = {"iterations": 200, "rtol": 1e-9 if products == "finite_difference" else 1e-13}
        makers: dict[str, Callable[[], mlopt.Estimator]] = {
            "dense": lambda: mlopt.Dense(products=products),
            "cg": lambda: mlopt.ConjugateGradient(products=products, **options),
            "minres": lambda: mlopt.MINRES(products=products, **options),
            "unrolled": lambda: mlopt.Unrolled(UNROLLED_STEPS, products=products),
        }
        return makers[self.spec.estimator]()

    def _optimizer(self, name: str, parameters: Any) -> Optimizer:
        traps, rule = self._traps(name), self.oracle.rules[name]
        first, *rest = [p for p in parameters if p.requires_grad]
        decay = float((rule.decay + rule.decoupled)[0])
        settings: dict[str, Any] = {"lr": rule.lr, "maximize": traps.maximize}
        groups = [{"params": [first], "weight_decay": decay}]
        if traps.one_group or not rest:
            groups[0]["params"].extend(rest)
        else:
            groups.append({"params": rest, "weight_decay": 0.0})
        if traps.bound:
            return Projected(groups, momentum=rule.momentum, bounds=self._bounds[name], **settings)
        if rule.kind == "sgd":
            return SGD(groups, momentum=rule.momentum, **settings)
        return {"adam": Adam, "adamw": AdamW}[rule.kind](groups, eps=rule.eps, **settings)

    def _declared(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a loss whose signature declares its references, but for the undeclared one."""
        modules, edge = self._modules, self.spec.edge
        undeclared = {edge[1]: edge[2]} if edge is not None and edge[0] == name else {}
        if "hidden" in undeclared.values():
            modules[name].hidden = [modules[ref] for ref in undeclared]

        def loss(module: nn.Module, batch: Any, **others: nn.Module) -> Any:
            for ref, how in undeclared.items():
                others.setdefault(ref, module.hidden[0] if how == "hidden" else modules[ref])
            return function(module, batch, **others)

        kind, keyword = inspect.Parameter, inspect.Parameter.KEYWORD_ONLY
        shown = [kind("module", kind.POSITIONAL_OR_KEYWORD), kind("batch", kind.POSITIONAL_OR_KEYWORD)]
        for ref in SHAPES[self.spec.shape][name]:
            if ref not in undeclared:
                shown.append(kind(ref, keyword))
            elif undeclared[ref] == "default":
                shown.append(kind(ref, keyword, default=modules[ref]))
        loss.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        return loss

    def _outer_loss(
        self, module: Vector, batch: Any, *, inner: Net, middle: Vector | None = None
    ) -> Tensor:
        inputs, labels = read(self.spec.outer_batch, batch)
        value = functional.mse_loss(inner(inputs), labels) + module().sin().sum() / 10
        return value if middle is None else value + 0.3 * middle().square().sum()

    def _middle_loss(self, module: Vector, batch: Any, *, outer: Vector, inner: Net | None = None) -> Tensor:
        traps, (inputs, labels) = self.spec.middle, read(self.spec.middle.batch, batch)
        b = module()
        value = b.pow(4).sum() / 4 - b @ outer().tanh() + (inputs.square().mean() + labels.mean()) * b.sum() / 10
        if traps.stop:
            value = value + (b - 0.4 * b.detach() - 0.1).square().sum() / 2
        if inner is not None:
            value = value + functional.mse_loss(inner(inputs), labels) / 2
        value = -value if traps.maximize else value
        return value if traps.regularizer else value + self._middle_regularizer(module)

    def _middle_regularizer(self, module: Vector) -> Tensor:
        return (-1 if self.spec.middle.maximize else 1) * module().square().sum()

    def _inner_loss(
        self, module: Net, batch: Any, *, outer: Vector | None = None, middle: Vector | None = None
    ) -> Tensor:
        traps, (inputs, labels) = self.spec.inner, read(self.spec.inner.batch, batch)
        if middle is None:
            c = outer()
        else:
            c = middle() if outer is None else middle() + 0.3 * outer()
        outputs = module(inputs)
        labels = labels + c[2] * self._s + (0.4 * outputs.detach() if traps.stop else 0.0)
        value = ((1 + (c[0] + self._s * c[1]).tanh()) * (outputs - labels).square()).mean()
        value = -value if traps.maximize else value
        return value if traps.regularizer else value + self._inner_regularizer(module)

    def _inner_regularizer(self, module: Net) -> Tensor:
        named = dict(module.named_parameters())
        total = sum(((named[k] - self._start[k]) / module.scale).square().sum() for k in self._free["inner"])
        return (-self._strength if self.spec.inner.maximize else self._strength) * total


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@attrs.frozen(kw_only=True)
class Verdict:
    """What mlopt makes of a problem.

    Attributes:
        kind: "right", "doubtful", "refused", "wrong" (and silent), or "raw" (an error that is not the library's).
        error: the relative error; None if nothing was returned.
        sentence: of the error, or the remarks.
    """

    kind: str
    error: float | None = None
    sentence: str = ""


def tolerance(spec: Spec) -> float:
    """Return the relative error of a right answer: differences of differences have half the digits."""
    return 1e-4 if spec.products == "finite_difference" and spec.shape.startswith("nested") else 1e-6


def verdict(case: Case | None, error: BaseException | None = None) -> Verdict:
    """Return what mlopt makes of a case; of an error if building it raised one."""
    try:
        if error is not None:
            raise error
        assert case is not None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = mlopt.hypergradient(case.problem, seed=0)
    except mlopt.MloptError as refusal:
        return Verdict(kind="refused", sentence=str(refusal))
    except Exception as raw:
        return Verdict(kind="raw", sentence=f"{type(raw).__name__}: {raw}")
    gradient = torch.cat([g.reshape(-1) for g in result.gradient.values()])
    off = float((gradient - case.expected).norm() / case.expected.norm())
    doubts = [str(w.message) for w in caught if issubclass(w.category, mlopt.TrustWarning)]
    doubts += [remark for report in result.reports.values() if report.doubtful for remark in report.remarks]
    right = off <= tolerance(case.spec)
    return Verdict(
        kind="doubtful" if doubts else "right" if right else "wrong", error=off, sentence="; ".join(doubts)
    )


def _in_inner(**options: Any) -> Spec:
    return Spec(net="mlp", inner=LevelTraps(**options))


#: Every trap alone, by name.
ALONE: dict[str, Spec] = {
    **{f"{norm}, nested": Spec(shape="nested", net=norm) for norm in NORMS},
    **{f"{norm}, nested, forward": Spec(shape="nested", net=norm, products="forward") for norm in NORMS},
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
        for owner, ref, shape in (("inner", "outer", "diamond"), ("outer", "middle", "chain"), ("middle", "inner", "nested"))
    },
    **{f"a batch that a loss changes ({batch})": _in_inner(batch=batch) for batch in BATCHES[1:]},
    **{f"a batch that the outer loss changes ({batch})": Spec(net="mlp", outer_batch=batch) for batch in BATCHES[1:]},
    "negative curvature": Spec(net="linear", saddle=True, estimator="cg"),
    **{
        f"variables of size {scale:.0e}, {products}": attrs.evolve(_in_inner(scale=scale), products=products)
        for scale in (1e-3, 1e-5, 1e-7)
        for products in ("autograd", "finite_difference")
    },
    "clip, unrolled": attrs.evolve(_in_inner(clip=1e-3), estimator="unrolled"),
    "hook": _in_inner(hook=True),
    "hook, forward": attrs.evolve(_in_inner(hook=True), products="forward"),
    "hook, unrolled": attrs.evolve(_in_inner(hook=True), estimator="unrolled"),
    "stop-gradient": _in_inner(stop=True),
    "stop-gradient, nested": Spec(shape="nested", middle=LevelTraps(stop=True)),
    "bound": _in_inner(bound=True),
    "frozen": _in_inner(frozen=True),
    "shared": Spec(net="shared"),
}
