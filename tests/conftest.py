"""Settings and fixtures of all tests."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# huggingface_hub and datasets read these when they are imported: no test downloads anything.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

# Features are computed in each test, and the user's cache is left alone.
os.environ["MLOPT_CACHE"] = "none"

# One cache per setting: Inductor would reuse kernels compiled for other instructions or thread counts, and fail.
_SETTING = f"{torch.__version__}-{torch.backends.cpu.get_cpu_capability()}-{torch.get_num_threads()}"
_CACHE = Path(tempfile.gettempdir()) / f"mlopt-inductor-{getpass.getuser()}-{_SETTING}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_CACHE))

#: Folders whose tests run in float64 on one thread.
FLOAT64 = ("estimators", "hypergradient", "linear", "problem")

# Continuous integration draws the same problems each time, so that failures come from the change. Elsewhere they are new.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


def pytest_configure(config: pytest.Config) -> None:
    """Ignore a deprecation: torch-geometric on import, and torch.compile, script a class."""
    config.addinivalue_line("filterwarnings", r"ignore:.torch\.jit\.script(_method)?. is deprecated:DeprecationWarning")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Return the folder of the public data sets: $MLOPT_DATA, else `shared/data` beside the repository."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("MLOPT_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"needs the public data sets, and there is no folder {folder}; set MLOPT_DATA")
    return folder


@pytest.fixture(autouse=True, scope="module")
def one_thread_in_double_precision(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run the tests of the core's mathematics in float64 on one thread, then restore both for the other folders."""
    if request.path.relative_to(Path(__file__).parent).parts[0] not in FLOAT64:
        yield
        return
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
