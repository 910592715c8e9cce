"""Gradient surgery: gradients of objectives that conflict are projected on each other's normal planes."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch

from mlopt.errors import ArgumentError

from ..models import objective_losses
from .method import Adapted, Method
from .pretraining import one_level

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor, nn

    import mlopt

    from ..experiment import Experiment
    from ..models import Pretraining
    from ..settings import Settings

__all__ = ["Surgery", "surgery"]


def surgery(gramian: Tensor) -> Tensor:
    """Return the weights w of gradient surgery: the mean of the projected gradients is sum_k w_k g_k.

    Each gradient is projected on the normal planes of the others in a random order: if <h, g_j> < 0 for the projected gradient
    h so far, then h <- h - <h, g_j> / ||g_j||^2 g_j. All of this is known from the inner products of the gradients. No number
    is read, so the host does not wait for the device.

    Args:
        gramian: <g_i, g_j>, (K, K).

    Returns:
        Positive weights, (K,): 1 / K each if no two gradients conflict.

    Source: Yu et al., NeurIPS 2020 (arXiv 2001.06782), algorithm 1.
    """
    count = len(gramian)
    squares = gramian.diagonal().clamp_min(torch.finfo(gramian.dtype).tiny)  # a gradient of zero conflicts with none
    projected = []
    for i in range(count):
        own = torch.eye(count, dtype=gramian.dtype, device=gramian.device)[i]
        for j in torch.randperm(count).tolist():
            if j != i:
                own[j] += (-(own @ gramian[j])).relu() / squares[j]
        projected.append(own)
    return torch.stack(projected).mean(0)


class Surgery(Method):
    """Pretraining along the mean of the objectives' gradients after gradient surgery (PCGrad).

    The encoder's gradients are projected. The head of an objective takes the gradient that it has at equal weights, so the
    method is equal weights as long as no two gradients conflict. The downstream task has no influence. The weights in the
    result are the shares of the objectives' gradients in the step of the encoder, averaged over the steps.

    Source: Yu et al., NeurIPS 2020 (arXiv 2001.06782).
    """

    name, title = "pcgrad", "gradient surgery"
    summary = (
        "Pretrained further with several objectives, whose conflicting gradients were projected (Yu et al., NeurIPS 2020, "
        "arXiv 2001.06782)."
    )
    uses_labels = False

    def check(self, settings: Settings, steps: int, objectives: Sequence[str]) -> None:
        """Refuse fp16: the gradients are combined before the loss scale is applied, so small ones would vanish."""
        if settings.precision == "fp16":
            raise ArgumentError(
                f"{self.name}: precision='fp16', in which gradients of single objectives vanish without a loss scale; use 'bf16' "
                "or 'none'"
            )

    def passes(self, experiment: Experiment) -> int:
        """Return one pass for each view of each objective, at each step."""
        return experiment.pretraining_steps * experiment.views

    def problem(self, experiment: Experiment, model: Pretraining) -> mlopt.Problem:
        """Return the pretraining as a problem of one level, which trains `model` in place."""
        objectives, scales = experiment.objectives, experiment.scales

        def loss(own: Pretraining, batch: Any) -> dict[str, Any]:
            encoder = [p for p in own.encoder.parameters() if p.requires_grad]
            shared = {id(p) for p in encoder}  # a head may be tied to a part of the encoder
            heads = [p for p in own.heads.parameters() if p.requires_grad and id(p) not in shared]
            losses, rows = {}, []
            for name, evaluate in objective_losses(own, batch, objectives, scales).items():
                value = evaluate()
                losses[name] = value.detach()
                gradient = torch.autograd.grad(value, [*encoder, *heads], allow_unused=True, materialize_grads=True)
                rows.append(_flat(gradient))
            gradients, size = torch.stack(rows), sum(p.numel() for p in encoder)
            of_encoder, of_heads = gradients[:, :size], gradients[:, size:]
            # The loss is evaluated under autocast, which would round the gradients.
            with torch.autocast(gradients.device.type, enabled=False):
                weights = surgery(of_encoder @ of_encoder.T)
                aggregated = torch.cat([weights @ of_encoder, of_heads.mean(0)])
            total = _with_gradient(torch.stack([*losses.values()]).mean(), aggregated, [*encoder, *heads])
            shares = zip(losses, weights / weights.sum(), strict=True)
            return {"loss": total, **losses, **{f"weight/{name}": share for name, share in shares}}

        return one_level(experiment, model, loss)

    def adapt(self, experiment: Experiment, callbacks: Sequence[mlopt.Callback] = ()) -> Adapted:
        """Pretrain the encoder further."""
        model = experiment.model()
        problem = self.problem(experiment, model)
        solution = experiment.solve(self.name, problem, experiment.pretraining_steps, callbacks=callbacks)
        history = solution.history
        weights = {name: statistics.fmean(history.column(f"pretraining/weight/{name}")) for name in experiment.names}
        return Adapted(encoder=model.encoder, weights=weights, history=history)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _with_gradient(value: Tensor, gradient: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return a scalar of a given value, whose gradient by the parameters is a given flat vector."""
    inner = torch.dot(gradient, _flat(parameters))
    return value + (inner - inner.detach())
