"""What all tests share."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Read when huggingface_hub and datasets are imported: no test fetches anything.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

# Inductor would reuse kernels that it compiled for other instructions or another number of threads, and fail.
_SETTING = f"{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}"
_CACHE = Path(tempfile.gettempdir()) / f"mlopt-inductor-{getpass.getuser()}-{_SETTING}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_CACHE))

# Continuous integration draws the same problems each time: a change is judged by what it changes. Elsewhere they are new ones.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Let torch-geometric be imported: it scripts a class on import, as torch.compile does, and PyTorch deprecates that."""
    config.addinivalue_line("filterwarnings", r"ignore:.torch\.jit\.script(_method)?. is deprecated:DeprecationWarning")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of the public data sets: $MLOPT_DATA, else `shared/data` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MLOPT_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the public data sets, and there is no folder {folder}; set MLOPT_DATA")
    return folder
