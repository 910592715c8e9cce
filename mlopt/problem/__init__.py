"""Levels, the graph that their losses imply, and their objectives as functions of variables."""

from .backward import backward
from .batch import copied, to_device
from .bounds import Bounds, has_hooks, unmoved
from .captures import Captures, setting
from .cost import LevelSize, PullbackCost
from .estimator import Block, Estimator, Linearization, Report, Vectors
from .fixed_point import FixedPoint, require_all_variables
from .game import game
from .graph import Graph, Node
from .level import Level, Variables, variables
from .losses import LossValue, Mixture, evaluate_loss, evaluate_regularizer
from .means import require_mean
from .objective import Objective, add_into, compare_evaluations, own_gradient, sum_values, used_derivatives
from .partial import partial_derivatives, partial_pieces
from .point import Carryover, Point, StreamedCotangent, restored
from .primitives import FAULTS, Fault, Primitives, faults
from .problem import Problem
from .processes import fingerprint, require_alike
from .residual import ResidualTerm, evaluate_residual
from .response import Response
from .solver import call_solver
from .stand_ins import cloned_buffers, standing_in
from .stream import Stream
from .tasks import Stacked, over_tasks, stacked
from .term import LevelTerm, Term, cut, derivatives
from .workspace import Workspace

__all__ = [
    "FAULTS",
    "Block",
    "Bounds",
    "Captures",
    "Carryover",
    "Estimator",
    "Fault",
    "FixedPoint",
    "Graph",
    "Level",
    "LevelSize",
    "LevelTerm",
    "Linearization",
    "LossValue",
    "Mixture",
    "Node",
    "Objective",
    "Point",
    "Primitives",
    "Problem",
    "PullbackCost",
    "Report",
    "ResidualTerm",
    "Response",
    "Stacked",
    "Stream",
    "StreamedCotangent",
    "Term",
    "Variables",
    "Vectors",
    "Workspace",
    "add_into",
    "backward",
    "call_solver",
    "cloned_buffers",
    "compare_evaluations",
    "copied",
    "cut",
    "derivatives",
    "evaluate_loss",
    "evaluate_regularizer",
    "evaluate_residual",
    "faults",
    "fingerprint",
    "game",
    "has_hooks",
    "over_tasks",
    "own_gradient",
    "partial_derivatives",
    "partial_pieces",
    "require_alike",
    "require_all_variables",
    "require_mean",
    "restored",
    "setting",
    "stacked",
    "standing_in",
    "sum_values",
    "to_device",
    "unmoved",
    "used_derivatives",
    "variables",
]
