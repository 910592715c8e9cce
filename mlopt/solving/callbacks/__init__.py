"""Callbacks of `solve`: the interface, the progress bar, early stopping, log files and experiment trackers."""

from .callback import Callback
from .early_stopping import EarlyStopping
from .files import CSVLogger, JSONLLogger, write_csv
from .progress import ProgressDisplay
from .trackers import MLflowLogger, TensorBoardLogger, TrackioLogger, WandbLogger

__all__ = [
    "CSVLogger",
    "Callback",
    "EarlyStopping",
    "JSONLLogger",
    "MLflowLogger",
    "ProgressDisplay",
    "TensorBoardLogger",
    "TrackioLogger",
    "WandbLogger",
    "write_csv",
]
