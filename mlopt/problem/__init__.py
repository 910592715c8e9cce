"""Levels, the graph that their losses imply, and their objectives as functions of variables."""

from .estimator import Block, Estimator, Linearization, Report, Vectors
from .graph import Graph, Node
from .level import Level, Variables, variables
from .losses import LossValue, Mixture, read_loss, scalar
from .point import Point, StreamedCotangent, restored
from .problem import Problem
from .stream import Stream, to_device
from .term import LevelTerm, Term, cloned_buffers, cut, derivatives, level_terms, standing_in

__all__ = [
    "Block",
    "Estimator",
    "Graph",
    "Level",
    "LevelTerm",
    "Linearization",
    "LossValue",
    "Mixture",
    "Node",
    "Point",
    "Problem",
    "Report",
    "Stream",
    "StreamedCotangent",
    "Term",
    "Variables",
    "Vectors",
    "cloned_buffers",
    "cut",
    "derivatives",
    "level_terms",
    "read_loss",
    "restored",
    "scalar",
    "standing_in",
    "to_device",
    "variables",
]
