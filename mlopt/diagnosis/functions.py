"""The functions of torch whose derivatives `mlopt derivatives` measures: smooth where they are evaluated, and small."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import attrs
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional, utils
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..tensors import Tensors

__all__ = ["Case", "Function", "cases"]

Function = Callable[..., Tensor]
Made = tuple[Function, Tensors]


@attrs.frozen
class Case:
    """A function to measure.

    Attributes:
        name: the name of the function in torch, and its options.
        kind: "norm", "attention", "activation", "loss", "layer" or "reduction".
        make: makes the function and the variables (float64, CPU) at which its derivatives are taken; draws from the global
            generator.
    """

    name: str
    kind: str
    make: Callable[[], Made]


def cases() -> Iterator[Case]:
    """Yield all functions."""
    for kind, table in {
        "norm": _norms() | _parametrizations(),
        "attention": _attention(),
        "activation": _activations(),
        "loss": _losses() | _losses_of_labels(),
        "layer": _layers() | _recurrent() | _embeddings(),
        "reduction": _reductions(),
    }.items():
        for name, make in table.items():
            yield Case(name, kind, make)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _apart(*shape: int) -> Tensor:
    """Return values that differ from one another by 0.3 or more, so that no displacement changes their order."""
    count = torch.Size(shape).numel()
    return (0.3 * (torch.randperm(count) - count / 2 + 0.25)).double().reshape(shape)


def _off_kinks(*shape: int) -> Tensor:
    """Return values at least 0.15 off the kinks of torch's activations, on all their pieces."""
    pieces = torch.tensor([-4, -2, -0.75, -0.25, 0.25, 0.75, 2, 4, 7], dtype=torch.float64)
    count = torch.Size(shape).numel()
    return (pieces[torch.arange(count) % 9] + 0.1 * (torch.rand(count) - 0.5)).reshape(shape)


def _of(function: Function, *shapes: tuple[int, ...], draw: Callable[..., Tensor] = _normal) -> Callable[[], Made]:
    return lambda: (function, tuple(draw(*shape) for shape in shapes))


def _module(
    build: Callable[[], nn.Module], *shapes: tuple[int, ...], draw: Callable[..., Tensor] = _normal
) -> Callable[[], Made]:
    """Return a maker of a module as a function of its inputs and parameters; every evaluation draws the same masks."""

    def make() -> Made:
        module = build().double()
        for parameter in module.parameters():
            parameter.data.add_(0.3 * _normal(*parameter.shape))
        names = [name for name, _ in module.named_parameters()]
        inputs = tuple(draw(*shape) for shape in shapes)

        def function(*variables: Tensor) -> Tensor:
            torch.manual_seed(0)
            like = variables[0]
            buffers = {
                n: b.to(like.device, like.dtype if b.is_floating_point() else b.dtype, copy=True)
                for n, b in module.named_buffers()
            }
            own = dict(zip(names, variables[len(inputs) :], strict=True))
            output = functional_call(module, {**own, **buffers}, variables[: len(inputs)])
            result: Tensor = output[0] if isinstance(output, tuple) else output
            return result

        return function, (*inputs, *(parameter.detach().clone() for parameter in module.parameters()))

    return make


def _norms() -> dict[str, Callable[[], Made]]:
    tracked = partial(nn.InstanceNorm1d, 3, affine=True, track_running_stats=True)
    return {
        "LayerNorm": _module(lambda: nn.LayerNorm(4), (3, 4)),
        "RMSNorm": _module(lambda: nn.RMSNorm(4), (3, 4)),
        "BatchNorm1d, train": _module(lambda: nn.BatchNorm1d(4), (5, 4)),
        "BatchNorm1d, eval": _module(lambda: nn.BatchNorm1d(4).eval(), (5, 4)),
        "BatchNorm1d without running statistics, eval": _module(
            lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(), (5, 4)
        ),
        "BatchNorm2d, train": _module(lambda: nn.BatchNorm2d(3), (2, 3, 2, 2)),
        "BatchNorm2d, eval": _module(lambda: nn.BatchNorm2d(3).eval(), (2, 3, 2, 2)),
        "GroupNorm": _module(lambda: nn.GroupNorm(2, 4), (3, 4, 2)),
        "InstanceNorm1d": _module(lambda: nn.InstanceNorm1d(3, affine=True), (2, 3, 4)),
        "InstanceNorm1d with running statistics, train": _module(tracked, (2, 3, 4)),
        "InstanceNorm1d with running statistics, eval": _module(lambda: tracked().eval(), (2, 3, 4)),
        "InstanceNorm2d": _module(lambda: nn.InstanceNorm2d(3), (2, 3, 2, 2)),
        "LocalResponseNorm": _module(lambda: nn.LocalResponseNorm(2), (2, 4, 3)),
        "normalize": _of(functional.normalize, (4, 5)),
    }


def _parametrizations() -> dict[str, Callable[[], Made]]:
    new = utils.parametrizations
    return {
        "utils.weight_norm": _module(lambda: utils.weight_norm(nn.Linear(4, 3)), (2, 4)),
        "weight_norm, dim=0": _module(lambda: new.weight_norm(nn.Linear(4, 3)), (2, 4)),
        "weight_norm, last dim": _module(lambda: new.weight_norm(nn.Linear(4, 3), dim=1), (2, 4)),
        "weight_norm, middle dim": _module(lambda: new.weight_norm(nn.Conv1d(4, 3, 2), dim=1), (2, 4, 3)),
        "weight_norm, all dims": _module(lambda: new.weight_norm(nn.Linear(4, 3), dim=-1), (2, 4)),
        "spectral_norm, train": _module(lambda: new.spectral_norm(nn.Linear(4, 3)), (2, 4)),
        "spectral_norm, eval": _module(lambda: new.spectral_norm(nn.Linear(4, 3)).eval(), (2, 4)),
        "orthogonal": _module(lambda: new.orthogonal(nn.Linear(3, 3)), (2, 3)),
    }


class _SelfAttention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self._need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.attention(x, x, x, need_weights=self._need_weights)[0]
        return output


def _by_math_kernel(make: Callable[[], Made]) -> Callable[[], Made]:
    """Return the maker of a function with the attention kernel that mlopt selects for second derivatives."""

    def changed() -> Made:
        function, variables = make()

        def plain(*variables: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return function(*variables)

        return plain, variables

    return changed


def _attention() -> dict[str, Callable[[], Made]]:
    attend = functional.scaled_dot_product_attention
    qkv = ((2, 2, 3, 4),) * 3
    layer = partial(nn.TransformerEncoderLayer, 4, 2, 5, 0.0, activation="gelu", batch_first=True)
    return {
        "scaled_dot_product_attention, default kernel": _of(attend, *qkv),
        "scaled_dot_product_attention, MATH kernel": _by_math_kernel(_of(attend, *qkv)),
        "causal attention, MATH kernel": _by_math_kernel(_of(partial(attend, is_causal=True), *qkv)),
        "MultiheadAttention with weights": _by_math_kernel(_module(lambda: _SelfAttention(True), (2, 3, 4))),
        "MultiheadAttention": _by_math_kernel(_module(lambda: _SelfAttention(False), (2, 3, 4))),
        "TransformerEncoderLayer, train": _by_math_kernel(_module(layer, (2, 3, 4))),
        "TransformerEncoderLayer, eval": _by_math_kernel(_module(lambda: layer().eval(), (2, 3, 4))),
    }


def _activations() -> dict[str, Callable[[], Made]]:
    names = (
        "ReLU ReLU6 ELU SELU CELU GELU SiLU Mish Softplus Softsign Tanh Tanhshrink Sigmoid LogSigmoid Hardtanh Hardsigmoid "
        "Hardswish Hardshrink Softshrink LeakyReLU PReLU RReLU"
    )
    made = {name: _module(getattr(nn, name), (4, 6), draw=_off_kinks) for name in names.split()}
    others: dict[str, Callable[[], nn.Module]] = {
        "GELU, tanh": lambda: nn.GELU("tanh"),
        "Threshold": lambda: nn.Threshold(0.1, 0.2),
        "RReLU, eval": lambda: nn.RReLU().eval(),
        "GLU": nn.GLU,
        "Softmin": lambda: nn.Softmin(1),
        "Softmax": lambda: nn.Softmax(1),
        "LogSoftmax": lambda: nn.LogSoftmax(1),
    }
    made |= {name: _module(build, (4, 6), draw=_off_kinks) for name, build in others.items()}
    return made | {
        "Softmax2d": _module(nn.Softmax2d, (2, 3, 2, 2)),
        "gumbel_softmax": _of(_gumbel_softmax, (4, 5)),
    }


def _gumbel_softmax(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return functional.gumbel_softmax(x)


def _losses() -> dict[str, Callable[[], Made]]:
    f, pair = functional, ((4, 5), (4, 5))
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    two: dict[str, Function] = {
        "mse_loss": f.mse_loss,
        "l1_loss": f.l1_loss,
        "cross_entropy, probabilities": lambda x, y: f.cross_entropy(x, y.softmax(1)),
        "binary_cross_entropy": lambda x, y: f.binary_cross_entropy(x.sigmoid(), y.sigmoid()),
        "binary_cross_entropy_with_logits": lambda x, y: f.binary_cross_entropy_with_logits(x, y.sigmoid()),
        "binary_cross_entropy_with_logits, pos_weight": lambda x, y: f.binary_cross_entropy_with_logits(
            x, y.sigmoid(), pos_weight=weights.to(x)
        ),
        "kl_div": lambda x, y: f.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"),
        "kl_div, log_target": lambda x, y: f.kl_div(
            x.log_softmax(1), y.log_softmax(1), reduction="batchmean", log_target=True
        ),
        "poisson_nll_loss": f.poisson_nll_loss,
        "gaussian_nll_loss": lambda x, y: f.gaussian_nll_loss(x, torch.zeros_like(x), y.exp()),
        "soft_margin_loss": lambda x, y: f.soft_margin_loss(x, y.detach().sign()),
        "hinge_embedding_loss": lambda x, y: f.hinge_embedding_loss(x, y.detach().sign()),
        "margin_ranking_loss": lambda x, y: f.margin_ranking_loss(x[:, 0], y[:, 0], signs.to(x)),
        "triplet_margin_loss": lambda x, y: f.triplet_margin_loss(x, y, x.flip(0), margin=9.0),
        "cosine_embedding_loss": lambda x, y: f.cosine_embedding_loss(x, y, signs.to(x)),
        "cosine_similarity": f.cosine_similarity,
        "pairwise_distance": f.pairwise_distance,
        "cdist": torch.cdist,
    }
    made = {name: _of(function, *pair) for name, function in two.items()}
    return made | {
        "huber_loss": _of(lambda x: f.huber_loss(x, x.roll(1, 1), delta=0.8), (4, 5), draw=_off_kinks),
        "smooth_l1_loss": _of(lambda x: f.smooth_l1_loss(x, x.roll(1, 1), beta=0.8), (4, 5), draw=_off_kinks),
    }


def _losses_of_labels() -> dict[str, Callable[[], Made]]:
    f, labels = functional, torch.tensor([0, 3, 2, 1])
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    several = torch.tensor([[0, 2, -1, 0, 0]] * 4)
    targets, lengths = torch.tensor([[1, 2], [2, 1]]), (torch.tensor([5, 5]), torch.tensor([2, 2]))
    one: dict[str, Function] = {
        "cross_entropy": lambda x: f.cross_entropy(x, labels.to(x.device)),
        "cross_entropy, reduction='none'": lambda x: f.cross_entropy(x, labels.to(x.device), reduction="none"),
        "cross_entropy, label_smoothing": lambda x: f.cross_entropy(x, labels.to(x.device), label_smoothing=0.1),
        "cross_entropy, weight": lambda x: f.cross_entropy(x, labels.to(x.device), weight=weights.to(x)),
        "cross_entropy, ignore_index": lambda x: f.cross_entropy(x, labels.to(x.device), ignore_index=3),
        "nll_loss": lambda x: f.nll_loss(x, labels.to(x.device)),
        "multi_margin_loss": lambda x: f.multi_margin_loss(x, labels.to(x.device)),
        "multilabel_margin_loss": lambda x: f.multilabel_margin_loss(x, several.to(x.device)),
        "multilabel_soft_margin_loss": lambda x: f.multilabel_soft_margin_loss(x, (x.detach() > 0).to(x)),
    }
    made = {name: _of(function, (4, 5), draw=_apart) for name, function in one.items()}
    return made | {
        "ctc_loss": _of(lambda x: f.ctc_loss(x.log_softmax(2), targets.to(x.device), *lengths), (5, 2, 4)),
    }


def _layers() -> dict[str, Callable[[], Made]]:
    built: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
        "Linear": (lambda: nn.Linear(4, 3), (2, 4)),
        "Conv1d": (lambda: nn.Conv1d(2, 3, 2), (2, 2, 4)),
        "Conv2d": (lambda: nn.Conv2d(2, 3, 2, stride=2, padding=1), (2, 2, 4, 4)),
        "Conv2d, groups": (lambda: nn.Conv2d(4, 4, 2, groups=2), (2, 4, 3, 3)),
        "Conv2d, dilation": (lambda: nn.Conv2d(2, 2, 2, dilation=2, padding=1), (2, 2, 3, 3)),
        "Conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 1, 2, 3, 3)),
        "ConvTranspose1d": (lambda: nn.ConvTranspose1d(2, 3, 2), (2, 2, 4)),
        "ConvTranspose2d": (lambda: nn.ConvTranspose2d(2, 3, 2), (1, 2, 2, 3)),
        "ConvTranspose2d, output_padding": (
            lambda: nn.ConvTranspose2d(2, 3, 2, stride=2, output_padding=1),
            (1, 2, 2, 3),
        ),
        "MaxPool1d": (lambda: nn.MaxPool1d(2), (2, 2, 4)),
        "MaxPool2d": (lambda: nn.MaxPool2d(2), (1, 2, 4, 4)),
        "AvgPool2d": (lambda: nn.AvgPool2d(2), (2, 2, 4, 4)),
        "LPPool2d": (lambda: nn.LPPool2d(2, 2), (1, 2, 4, 4)),
        "AdaptiveAvgPool2d": (lambda: nn.AdaptiveAvgPool2d(2), (2, 2, 4, 5)),
        "AdaptiveMaxPool2d": (lambda: nn.AdaptiveMaxPool2d(2), (1, 2, 4, 4)),
        "Upsample, bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), (1, 2, 2, 3)),
        "Upsample, bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), (1, 2, 2, 3)),
        "PixelShuffle": (lambda: nn.PixelShuffle(2), (1, 4, 2, 2)),
        "Unfold": (lambda: nn.Unfold(2), (1, 2, 3, 3)),
        "ReflectionPad1d": (lambda: nn.ReflectionPad1d(1), (1, 2, 3)),
        "Dropout": (lambda: nn.Dropout(0.5), (4, 5)),
        "AlphaDropout": (lambda: nn.AlphaDropout(0.5), (4, 5)),
    }
    made = {
        name: _module(build, shape, draw=_apart if "MaxPool" in name else _normal)
        for name, (build, shape) in built.items()
    }
    return made | {
        "Bilinear": _module(lambda: nn.Bilinear(4, 4, 3), (2, 4), (2, 4)),
        "grid_sample": _of(_grid_sample, (1, 2, 4, 4), (1, 2, 2, 2)),
    }


def _grid_sample(image: Tensor, grid: Tensor) -> Tensor:
    return functional.grid_sample(image, 0.7 * grid.tanh(), align_corners=True)


def _recurrent() -> dict[str, Callable[[], Made]]:
    sequence, step = (2, 3, 3), (2, 3)
    return {
        "RNN, tanh": _module(lambda: nn.RNN(3, 4), sequence),
        "RNN, relu": _module(lambda: nn.RNN(3, 4, nonlinearity="relu"), sequence),
        "LSTM": _module(lambda: nn.LSTM(3, 4, 2), sequence),
        "LSTM, bidirectional, proj_size": _module(lambda: nn.LSTM(3, 4, proj_size=2, bidirectional=True), sequence),
        "GRU": _module(lambda: nn.GRU(3, 4), sequence),
        "RNNCell": _module(lambda: nn.RNNCell(3, 4), step),
        "LSTMCell": _module(lambda: nn.LSTMCell(3, 4), step),
        "GRUCell": _module(lambda: nn.GRUCell(3, 4), step),
    }


def _embeddings() -> dict[str, Callable[[], Made]]:
    indices = torch.tensor([[0, 2, 2], [1, 3, 0]])

    def bag(mode: str) -> Function:
        return lambda w: functional.embedding_bag(indices.to(w.device), w, mode=mode)

    return {
        "embedding": _of(lambda w: functional.embedding(indices.to(w.device), w), (4, 3)),
        "embedding_bag, sum": _of(bag("sum"), (4, 3)),
        "embedding_bag, mean": _of(bag("mean"), (4, 3)),
        "embedding_bag, max": _of(bag("max"), (4, 3), draw=_apart),
    }


def _reductions() -> dict[str, Callable[[], Made]]:
    index = torch.arange(20).reshape(4, 5) % 3

    def scatter(reduce: str) -> Function:
        return lambda x: torch.full((4, 3), -2.0).to(x).scatter_reduce(1, index.to(x.device), x, reduce)

    table: dict[str, Function] = {
        "logsumexp": lambda x: x.logsumexp(1),
        "logcumsumexp": lambda x: x.logcumsumexp(1),
        "norm": lambda x: x.norm(dim=1),
        "var": lambda x: x.var(1),
        "std": lambda x: x.std(1),
        "prod": lambda x: x.prod(1),
        "cumprod": lambda x: x.cumprod(1),
        "max": lambda x: x.max(1).values,
        "median": lambda x: x.median(1).values,
        "sort": lambda x: x.sort(1).values,
        "scatter_reduce, sum": scatter("sum"),
        "scatter_reduce, mean": scatter("mean"),
        "scatter_reduce, amax": scatter("amax"),
        "scatter_reduce, prod": scatter("prod"),
        "pdist": torch.pdist,
    }
    return {name: _of(function, (4, 5), draw=_apart) for name, function in table.items()}
