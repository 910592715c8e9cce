"""A drawn problem, written twice: with modules for mlopt, and in primitives; and what mlopt makes of it."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import attrs
import torch
from adversary_cases import NESTED, SHAPES, LevelTraps, Spec
from adversary_modules import DOUBLED, Net, Projected, Vector, read, wrap
from adversary_oracle import Chain, Rule, UnsolvedError, predict
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

import mlopt

__all__ = ["Case", "UnsolvedError", "Verdict", "tolerance", "verdict"]

UNROLLED_STEPS = 3
_UNROLLED = ("sgd", "adam", "adamw")
_OPTIMIZERS = {"adam": Adam, "adamw": AdamW, "rmsprop": RMSprop, "adagrad": Adagrad}


class Case:
    """A problem on modules at the fixed point of its primitives, or where the unrolled steps start.

    Attributes:
        problem: the problem for mlopt.
        expected: the hypergradient from primitives, (3,).

    Raises:
        UnsolvedError: there is no fixed point near the start.
    """

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(spec.seed), dtype=torch.float64)
        self._s = draw(6)
        self._data = {name: (draw(6, 2), 0.5 * draw(6)) for name in SHAPES[spec.shape]}
        self._modules: dict[str, nn.Module] = {"outer": Vector(0.5 * draw(3), spec.outer_scale)}
        if "middle" in SHAPES[spec.shape]:
            self._modules["middle"] = Vector(0.5 * draw(3), spec.middle.scale, spec.middle.frozen)
        self._modules["inner"] = self._net(draw)
        self._start = {name: p.detach().clone() for name, p in self._modules["inner"].named_parameters()}
        self._free = {name: _trainable(module) for name, module in self._modules.items()}
        #: The rate of the outer steps.
        self.rate = 0.1 * spec.outer_scale**2
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
        units = (1e-5 if spec.uneven else spec.inner.scale, spec.inner.scale)
        net = Net(spec.net, spec.activation, units, spec.inner.frozen)
        named = dict(net.named_parameters())
        self._units = {k: 1.0 if k.startswith("norm") else units[not k.startswith("first")] for k in named}
        for name, p in named.items():
            start = (1.0 if p.dim() > 1 else 0.3) * draw(*p.shape)
            if name == "norm.weight":
                start = 1.0 + 0.3 * start
            elif name.endswith("original0"):
                start = 1.0 + start.abs()
            p.data = start * self._units[name]
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
        unit = 1e-5 if self.spec.uneven and name == "inner" else traps.scale
        kind = "sgd" if traps.bound or (self._unrolled and traps.optimizer not in _UNROLLED) else traps.optimizer
        apart = kind == "adamw"
        moved, free = torch.ones_like(x, dtype=torch.bool), torch.ones_like(x, dtype=torch.bool)
        moved[1], free[0] = not traps.hook, not traps.bound
        stepped = torch.ones_like(moved)
        stepped[next(iter(self._free[name].values())).numel() :] = not traps.part
        return Rule(
            sign=-1.0 if traps.maximize else 1.0,
            decay=torch.zeros_like(x) if apart else decay * traps.factor / unit**2,
            decoupled=0.3 * decay if apart else torch.zeros_like(x),
            kind=kind,
            lr=0.1 * unit**2 / traps.factor if kind == "sgd" else 0.05 * unit,
            momentum=0.5,
            eps=traps.eps,
            clip=None if traps.clip is None else traps.clip * traps.factor / traps.scale,
            moved=moved,
            stepped=stepped,
            free=free,
        )

    def _outputs(self, z: Tensor, inputs: Tensor) -> Tensor:
        return predict(self.spec.net, self.spec.activation, self._units, self._named(z), inputs)

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
        a = a / self.spec.outer_scale
        value = (self._outputs(z, inputs) - labels).square().mean() + torch.sin(a).sum() / 10
        return value + 0.3 * self._whole(b).square().sum() if "middle" in SHAPES[self.spec.shape]["outer"] else value

    def _middle_value(self, b: Tensor, stopped: Tensor, a: Tensor, z: Tensor) -> Tensor:
        traps, (inputs, labels) = self.spec.middle, self._batch("middle")
        b, stopped, a = self._whole(b), self._whole(stopped), a / self.spec.outer_scale
        value = (b**4).sum() / 4 - b @ torch.tanh(a) + (inputs.square().mean() + labels.mean()) * b.sum() / 10
        value = value + b.square().sum()
        if traps.stop:
            value = value + (b - 0.4 * stopped - 0.1).square().sum() / 2
        if self.spec.shape.startswith("nested"):
            value = value + (self._outputs(z, inputs) - labels).square().mean() / 2
        return self._signed(traps) * value

    def _inner_value(self, z: Tensor, stopped: Tensor, a: Tensor, b: Tensor) -> Tensor:
        traps, (inputs, labels) = self.spec.inner, self._batch("inner")
        refers, a = SHAPES[self.spec.shape]["inner"], a / self.spec.outer_scale
        c = self._whole(b) + (0.3 * a if "outer" in refers else 0.0) if "middle" in refers else a
        labels = labels + c[2] * self._s + (0.4 * self._outputs(stopped, inputs) if traps.stop else 0.0)
        fit = ((1 + torch.tanh(c[0] + self._s * c[1])) * (self._outputs(z, inputs) - labels).square()).mean()
        named = self._named(z)
        anchor = sum(((named[k] - self._start[k]) / self._units[k]).square().sum() for k in self._free["inner"])
        return self._signed(traps) * (fit + self._strength * anchor)

    @staticmethod
    def _signed(traps: LevelTraps) -> float:
        return -traps.factor if traps.maximize else traps.factor

    @property
    def _strength(self) -> float:
        return -0.7 if self.spec.saddle else 0.4

    def _bound(self, name: str) -> tuple[float, float]:
        if not self._traps(name).bound:
            return float("-inf"), float("inf")
        held = float(self._flat(name)[0])
        traps = self._traps(name)
        unit = 1e-5 if self.spec.uneven and name == "inner" else traps.scale
        push = float(self.oracle.push(name)[0]) * unit / traps.factor
        if abs(push) < 1e-3:
            raise UnsolvedError
        return (held, float("inf")) if push > 0 else (float("-inf"), held)

    # The same with modules.

    def _level(self, name: str) -> mlopt.Level:
        loss = {"outer": self._outer_loss, "middle": self._middle_loss, "inner": self._inner_loss}[name]
        module, data = self._modules[name], [wrap(self._kind(name), *self._data[name])]
        if name == "outer":
            outermost = partial(SGD, lr=self.rate)
            return mlopt.Level(name, module, self._declared(name, loss), data=data, optimizer=outermost)
        traps = self._traps(name)
        if traps.hook:
            first = next(iter(self._free[name].values()))
            mask = torch.ones(first.numel(), dtype=torch.float64)
            mask[1] = 0.0
            first.register_hook(lambda g: g * mask.to(g).reshape(g.shape))
        regularizer = {"middle": self._middle_regularizer, "inner": self._inner_regularizer}[name]
        optimizer = partial(self._optimizer, name)
        return mlopt.Level(
            name,
            module,
            self._declared(name, loss),
            data=data,
            optimizer=optimizer(module.parameters()) if traps.made else optimizer,
            clip=self.oracle.rules[name].clip,
            estimator=self._estimator(name),
            regularizer=regularizer if traps.regularizer else None,
        )

    def _kind(self, name: str) -> str:
        return self.spec.outer_batch if name == "outer" else self._traps(name).batch

    def _estimator(self, name: str) -> mlopt.Estimator:
        products = self.spec.products
        options: dict[str, Any] = {"iterations": 50, "rtol": 1e-8 if products == "finite_difference" else 1e-12}
        same = {"curvature_data": [wrap(self._kind(name), *self._data[name])]} if self.spec.curvature else {}
        makers: dict[str, Callable[[], mlopt.Estimator]] = {
            "dense": lambda: mlopt.Dense(products=products, **same),
            "cg": lambda: mlopt.ConjugateGradient(products=products, **options, **same),
            "minres": lambda: mlopt.MINRES(products=products, **options, **same),
            "unrolled": lambda: mlopt.Unrolled(steps=UNROLLED_STEPS, products=products),
        }
        # Below an iterative solver, another one would take thousands of products.
        inside = self.spec.shape in NESTED and name == "inner" and products != "autograd"
        return makers["dense" if inside else self.spec.estimator]()

    def _optimizer(self, name: str, parameters: Any) -> Optimizer:
        traps, rule = self._traps(name), self.oracle.rules[name]
        first, *rest = [p for p in parameters if p.requires_grad]
        rest = [] if traps.part else rest
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
        return _OPTIMIZERS[rule.kind](groups, eps=rule.eps, **settings)

    def _declared(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a loss whose signature declares its references, but for the undeclared one."""
        modules, edge = self._modules, self.spec.edge
        undeclared = {edge[1]: edge[2]} if edge is not None and edge[0] == name else {}
        if "hidden" in undeclared.values():
            modules[name].hidden = [modules[ref] for ref in undeclared]

        def loss(module: nn.Module, batch: Any, **others: nn.Module) -> Any:
            for ref, how in undeclared.items():
                others.setdefault(ref, module.hidden[0] if how == "hidden" else modules[ref])
            value = function(module, batch, **others)
            return {"loss": value, "size": value.detach()} if self.spec.mapping else value

        kind, keyword = inspect.Parameter, inspect.Parameter.KEYWORD_ONLY
        shown = [kind("module", kind.POSITIONAL_OR_KEYWORD), kind("batch", kind.POSITIONAL_OR_KEYWORD)]
        for ref in SHAPES[self.spec.shape][name]:
            if ref not in undeclared:
                shown.append(kind(ref, keyword))
            elif undeclared[ref] == "default":
                shown.append(kind(ref, keyword, default=modules[ref]))
        loss.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        return loss

    def _outer_loss(self, module: Vector, batch: Any, *, inner: Net, middle: Vector | None = None) -> Tensor:
        inputs, labels = read(self.spec.outer_batch, batch)
        value = functional.mse_loss(inner(inputs), labels) + module().sin().sum() / 10
        return value if middle is None else value + 0.3 * middle().square().sum()

    def _middle_loss(self, module: Vector, batch: Any, *, outer: Vector, inner: Net | None = None) -> Tensor:
        traps, (inputs, labels) = self.spec.middle, read(self.spec.middle.batch, batch)
        b, a = module(), outer()
        a = torch.cat([a[:2], a[2:].detach()]) if traps.stop_outer else a
        value = b.pow(4).sum() / 4 - b @ a.tanh() + (inputs.square().mean() + labels.mean()) * b.sum() / 10
        if traps.stop:
            value = value + (b - 0.4 * b.detach() - 0.1).square().sum() / 2
        if inner is not None:
            value = value + functional.mse_loss(inner(inputs), labels) / 2
        value = self._signed(traps) * value
        return value if traps.regularizer else value + self._middle_regularizer(module)

    def _middle_regularizer(self, module: Vector) -> Tensor:
        return self._signed(self.spec.middle) * module().square().sum()

    def _inner_loss(
        self, module: Net, batch: Any, *, outer: Vector | None = None, middle: Vector | None = None
    ) -> Tensor:
        traps, (inputs, labels) = self.spec.inner, read(self.spec.inner.batch, batch)
        values = [scale * level() for scale, level in ((1.0, middle), (0.3, outer)) if level is not None]
        c = sum(values) if middle is not None else outer()
        c = torch.cat([c[:2], c[2:].detach()]) if traps.stop_outer else c
        outputs = module(inputs)
        labels = labels + c[2] * self._s + (0.4 * outputs.detach() if traps.stop else 0.0)
        value = ((1 + (c[0] + self._s * c[1]).tanh()) * (outputs - labels).square()).mean()
        value = self._signed(traps) * value
        return value if traps.regularizer else value + self._inner_regularizer(module)

    def _inner_regularizer(self, module: Net) -> Tensor:
        named = dict(module.named_parameters())
        total = sum(((named[k] - self._start[k]) / self._units[k]).square().sum() for k in self._free["inner"])
        return self._signed(self.spec.inner) * self._strength * total


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
    """Return the relative error of a right answer: differences have some nine digits, of which a solve loses its condition.

    Variables in units of 1 and 1e-5 side by side have a condition of 1e10 or more.
    """
    if spec.products == "finite_difference":
        return 1e-3 if spec.uneven else 1e-4
    return 1e-6


def verdict(case: Case | None, error: BaseException | None = None) -> Verdict:
    """Return what mlopt makes of a case; of an error if building it raised one."""
    try:
        if error is not None:
            raise error
        assert case is not None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            gradient, doubts = _solved(case) if case.spec.solved else _at_the_point(case)
    except mlopt.MloptError as refusal:
        return Verdict(kind="refused", sentence=str(refusal))
    except Exception as raw:
        return Verdict(kind="raw", sentence=f"{type(raw).__name__}: {raw}")
    off = float((gradient - case.expected).norm() / case.expected.norm())
    doubts += [str(w.message) for w in caught if issubclass(w.category, mlopt.TrustWarning)]
    right = off <= tolerance(case.spec)
    return Verdict(kind="doubtful" if doubts else "right" if right else "wrong", error=off, sentence="; ".join(doubts))


def _at_the_point(case: Case) -> tuple[Tensor, list[str]]:
    """Return the hypergradient, and the remarks of doubtful reports."""
    result = mlopt.hypergradient(case.problem, seed=0)
    doubts = [remark for report in result.reports.values() if report.doubtful for remark in report.remarks]
    return torch.cat([g.reshape(-1) for g in result.gradient.values()]), doubts


def _solved(case: Case) -> tuple[Tensor, list[str]]:
    """Return the hypergradient that an outer step of SGD followed; the levels inside rest at their fixed point."""
    outer = case.problem.outermost.parameters
    before = nn.utils.parameters_to_vector(outer).detach().clone()
    mlopt.solve(case.problem, steps=1, seed=0)
    return (before - nn.utils.parameters_to_vector(outer).detach()) / case.rate, []
