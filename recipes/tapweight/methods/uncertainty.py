"""Weights from the homoscedastic uncertainty of each objective, learned together with the encoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..models import objective_losses
from .method import Adapted, Method
from .pretraining import one_level

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import mlopt

    from ..experiment import Experiment
    from ..models import Pretraining

__all__ = ["Uncertainty"]


class _Uncertain(nn.Module):
    """theta, and s_k, the logarithm of the variance of each objective; s starts at zero."""

    def __init__(self, model: Pretraining, count: int) -> None:
        super().__init__()
        self.model = model
        self.log_variances = nn.Parameter(torch.zeros(count))

    def weights(self) -> torch.Tensor:
        """Return exp(-s_k) over their sum, (K,)."""
        return (-self.log_variances.detach()).softmax(0)


class Uncertainty(Method):
    """Pretraining on sum_k exp(-s_k) L_k + s_k, in which s is trained together with theta.

    This is twice the loss of the source for a regression, with s_k = log sigma_k^2. At a minimum over s, exp(s_k) = L_k: an
    objective of small loss has a large weight. The downstream task has no influence. s is stepped at the learning rate of
    weights, without weight decay; a schedule of the learning rate lowers it as well.

    Source: Kendall, Gal & Cipolla, CVPR 2018 (arXiv 1705.07115), equation 7.
    """

    name, title = "uncertainty", "uncertainty weights"
    summary = (
        "Pretrained further with several objectives, weighted by their homoscedastic uncertainty (Kendall, Gal & Cipolla, CVPR "
        "2018, arXiv 1705.07115)."
    )
    uses_labels = False

    def passes(self, experiment: Experiment) -> int:
        """Return one pass for each view of each objective, at each step."""
        return experiment.pretraining_steps * experiment.views

    def problem(self, experiment: Experiment, model: Pretraining) -> mlopt.Problem:
        """Return the pretraining as a problem of one level, which trains `model` and s in place."""
        objectives, scales, settings = experiment.objectives, experiment.scales, experiment.settings
        module = _Uncertain(model, len(objectives)).to(experiment.device)

        def loss(own: _Uncertain, batch: Any) -> dict[str, Any]:
            losses = {name: value() for name, value in objective_losses(own.model, batch, objectives, scales).items()}
            s = own.log_variances
            weights = {f"weight/{name}": weight for name, weight in zip(losses, own.weights(), strict=True)}
            total = ((-s).exp() * torch.stack([*losses.values()]) + s).sum()
            return {"loss": total, **{name: value.detach() for name, value in losses.items()}, **weights}

        def optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            theta = [parameter for parameter in parameters if parameter is not module.log_variances]
            s = {"params": [module.log_variances], "lr": settings.weights_lr, "weight_decay": 0.0}
            return settings.adam(settings.pretraining_lr)([{"params": theta}, s])

        return one_level(experiment, module, loss, optimizer)

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Pretrain the encoder further and learn s."""
        model = experiment.model()
        problem = self.problem(experiment, model)
        solution = experiment.solve(self.name, problem, experiment.pretraining_steps, callbacks=callbacks)
        module = problem["pretraining"].module
        assert isinstance(module, _Uncertain)
        weights = dict(zip(experiment.names, module.weights().tolist(), strict=True))
        return Adapted(encoder=model.encoder, weights=weights, history=solution.history)
