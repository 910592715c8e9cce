"""The stages of a run: rehearsals, adaptation and finetuning; several processes share the tasks of each stage."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from mlopt.errors import ArgumentError
from mlopt.ranks import ALONE
from mlopt.rng import derive_seed

from .finetuning import Finetuned, finetune, unfinetuned
from .methods import Adapted
from .sharing import shared

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    import mlopt
    from mlopt.ranks import Ranks

    from .encoder import Encoder
    from .experiment import Experiment
    from .methods import Method
    from .settings import Settings
    from .task import Task

__all__ = ["adapt_all", "finetune_all"]


def adapt_all(
    ranks: Ranks,
    methods: Sequence[Method],
    experiments: Mapping[str, Experiment],
    callbacks: Sequence[mlopt.Callback],
) -> dict[str, Adapted]:
    """Return the encoder that each method adapts, by the name of the method.

    Args:
        ranks: the processes of the run.
        methods: the main method last. It is the first to adapt the encoder, in the first process.
        experiments: by the name of the method.
        callbacks: called while the main method adapts the encoder.
    """
    tasks, costs = [], []
    ordered = [methods[-1], *methods[:-1]]
    for method in ordered:
        experiment = experiments[method.name]
        rehearsed = method.rehearse(attrs.evolve(experiment, ranks=ranks))
        own = attrs.evolve(experiment, rehearsed=rehearsed, ranks=ALONE)
        tasks.append(partial(method.adapt, own, callbacks if method is methods[-1] else ()))
        costs.append(method.passes(experiment))

    def receive(k: int, plain: dict[str, Any]) -> Adapted:
        method = ordered[k]
        encoder = experiments[method.name].model().encoder
        return Adapted(**{**plain, "encoder": _loaded(encoder, plain["encoder"], f"the encoder of {method.title}")})

    saved = all(experiment.checkpoints is not None for experiment in experiments.values())
    adapted = shared(ranks, tasks, costs, send=lambda _, result: _sent(result), receive=receive, saved=saved)
    return {method.name: result for method, result in zip(ordered, adapted, strict=True)}


def _sent(adapted: Adapted) -> dict[str, Any]:
    list(adapted.history)  # reads the numbers that are still tensors
    return {**attrs.asdict(adapted, recurse=False), "encoder": _state(adapted.encoder)}


def finetune_all(
    ranks: Ranks,
    methods: Sequence[Method],
    experiments: Mapping[str, Experiment],
    adapted: Mapping[str, Adapted],
    counts: Mapping[str, int],
) -> dict[str, tuple[Finetuned, ...]]:
    """Return the finetuned models of each method, by its name: each finetuning has a seed of its own.

    Args:
        ranks, methods, experiments: as for `adapt_all`.
        adapted: the encoders, as `adapt_all` returns them.
        counts: how often each encoder is finetuned.
    """
    runs = [(method, k) for method in methods for k in range(counts[method.name])]

    def start(method: Method, k: int) -> tuple[Encoder, Task, Settings, int]:
        experiment = experiments[method.name]
        encoder = adapted[method.name].encoder
        return encoder, experiment.task, experiment.settings, derive_seed(experiment.seed, "finetune", k)

    def run(method: Method, k: int) -> Finetuned:
        encoder, task, settings, seed = start(method, k)
        number = f" {k + 1} of {counts[method.name]}" if counts[method.name] > 1 else ""
        solve = partial(
            experiments[method.name].solve,
            f"finetuning-{method.name}-{k}",
            title=f"finetuning{number} ({method.name})",
        )
        return finetune(encoder, task, settings, seed=seed, solve=solve)

    def receive(number: int, plain: dict[str, Any]) -> Finetuned:
        model = unfinetuned(*start(*runs[number]))
        model = _loaded(model, plain["model"], f"the finetuned model of {runs[number][0].title}")
        return Finetuned(**{**plain, "model": model})

    def send(number: int, result: Finetuned) -> dict[str, Any]:
        return {**attrs.asdict(result, recurse=False), "model": _state(result.model)}

    tasks = [partial(run, *own) for own in runs]
    saved = all(experiment.checkpoints is not None for experiment in experiments.values())
    finetuned = shared(ranks, tasks, [1.0] * len(tasks), send=send, receive=receive, saved=saved)
    return {
        method.name: tuple(each for (own, _), each in zip(runs, finetuned, strict=True) if own is method)
        for method in methods
    }


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module on the host."""
    return {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}


def _loaded(module: Any, state: Mapping[str, Tensor], name: str) -> Any:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise ArgumentError(
            f"{name} has a different architecture from the encoder of the run, so processes cannot exchange it; run "
            "this method in one process"
        ) from error
    return module
