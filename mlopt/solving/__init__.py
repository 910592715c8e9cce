"""Solve a problem: the schedule of steps, checkpoints, history and callbacks."""

from .callbacks import (
    Callback,
    CSVLogger,
    EarlyStopping,
    JSONLLogger,
    MLflowLogger,
    ProgressDisplay,
    TensorBoardLogger,
    TrackioLogger,
    WandbLogger,
    write_csv,
)
from .checkpoints import Checkpoints
from .history import History
from .interruption import Interruption, ending_if
from .real_steps import RealSteps
from .run import Run
from .solve import Solution, solve

__all__ = [
    "CSVLogger",
    "Callback",
    "Checkpoints",
    "EarlyStopping",
    "History",
    "Interruption",
    "JSONLLogger",
    "MLflowLogger",
    "ProgressDisplay",
    "RealSteps",
    "Run",
    "Solution",
    "TensorBoardLogger",
    "TrackioLogger",
    "WandbLogger",
    "ending_if",
    "solve",
    "write_csv",
]
