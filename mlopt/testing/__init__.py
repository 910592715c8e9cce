"""Problems with known hypergradients, for tests of the library's estimators and of yours."""

from .closed_form import ClosedForm, logistic_regression, quadratic
from .contract import EstimatorContract
from .shapes import SHAPES, Shape, ladder
from .side_effects import same, snapshot, stateful_problem, train_a_little

__all__ = [
    "SHAPES",
    "ClosedForm",
    "EstimatorContract",
    "Shape",
    "ladder",
    "logistic_regression",
    "quadratic",
    "same",
    "snapshot",
    "stateful_problem",
    "train_a_little",
]
