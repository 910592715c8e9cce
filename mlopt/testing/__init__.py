"""Problems with known hypergradients, for tests of estimators: the library's own, and those of people who write one."""

from .closed_form import ClosedForm, logistic_regression, quadratic
from .shapes import SHAPES, Shape, ladder

__all__ = ["SHAPES", "ClosedForm", "Shape", "ladder", "logistic_regression", "quadratic"]
