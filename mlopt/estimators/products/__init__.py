"""Products of a term's second derivatives with vectors: one symmetric product, several ways to evaluate it."""

from .autograd import Autograd
from .compiled import Compiled
from .finite_difference import FiniteDifference, relative_step
from .forward import Forward
from .gauss_newton import GaussNewton
from .product import Product
from .second_derivatives import SecondDerivatives

__all__ = [
    "PRODUCTS",
    "Autograd",
    "Compiled",
    "FiniteDifference",
    "Forward",
    "GaussNewton",
    "Product",
    "SecondDerivatives",
    "relative_step",
]

#: The ways to evaluate products, by the name that estimators take.
PRODUCTS: dict[str, type[Product]] = {
    "autograd": Autograd,
    "forward": Forward,
    "finite_difference": FiniteDifference,
    "gauss_newton": GaussNewton,
}
