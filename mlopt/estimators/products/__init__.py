"""Products of a term's second derivatives with vectors: one symmetric product, several ways to evaluate it."""

from .autograd import AutogradProduct
from .compiled import CompiledProduct
from .difference import Difference, relative_step
from .finite_difference import FiniteDifferenceProduct
from .forward import ForwardProduct
from .full_precision import full_precision
from .gauss_newton import GaussNewtonProduct, cut_at_outputs
from .kernels import differentiable_kernels, graph_of, refuse_once_differentiable
from .lengths import SMALL, Moves, moves_of, search
from .mean import MeanSecondDerivatives, on_batches
from .product import Product, name_kernels
from .second_derivatives import SecondDerivatives
from .supplied import SuppliedProduct
from .traced import TracedProduct

__all__ = [
    "COMPILED",
    "PRODUCTS",
    "SMALL",
    "AutogradProduct",
    "CompiledProduct",
    "Difference",
    "FiniteDifferenceProduct",
    "ForwardProduct",
    "GaussNewtonProduct",
    "MeanSecondDerivatives",
    "Moves",
    "Product",
    "SecondDerivatives",
    "SuppliedProduct",
    "TracedProduct",
    "cut_at_outputs",
    "differentiable_kernels",
    "full_precision",
    "graph_of",
    "moves_of",
    "name_kernels",
    "on_batches",
    "refuse_once_differentiable",
    "relative_step",
    "search",
]

#: The classes of products, by the name that estimators accept.
PRODUCTS: dict[str, type[Product]] = {
    "autograd": AutogradProduct,
    "forward": ForwardProduct,
    "finite_difference": FiniteDifferenceProduct,
    "gauss_newton": GaussNewtonProduct,
}

#: Those that can be compiled, and the classes that do so.
COMPILED: dict[str, type[Product]] = {"autograd": TracedProduct, "forward": CompiledProduct}
