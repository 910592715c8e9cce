"""The libraries as processes, each with the Python of its own environment, and interleaved timings across them."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from . import cases
from .adapters import LIBRARIES, family

__all__ = ["Absent", "Library", "Part", "Workplace"]

ROOT = Path(__file__).resolve().parents[2]


class Absent(Exception):  # noqa: N818
    """A library that cannot be started, with the reason."""


class Part(NamedTuple):
    """The part of a section with this case, family of estimators and number of iterations; None stands for all."""

    case: str | None = None
    family: str | None = None
    iterations: int | None = None


class Library:
    """One library in a process of its own.

    Args:
        name: among the adapters.
        python: of its environment.
        device: "cpu" or "cuda".

    Raises:
        Absent: this Python does not exist, or it cannot import the library.
    """

    def __init__(self, name: str, python: str, device: str) -> None:
        self.name, self.python, self.device = name, python, device
        # -P keeps the current folder off the path, so that a library is imported from its environment only.
        surroundings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        #: The last answer of a running loop.
        self.latest: dict[str, Any] = {}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        try:
            self._process = subprocess.Popen(
                [python, "-P", "-m", "benchmarks.hypergrad.worker", name, device],
                env=surroundings,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
            )
        except OSError as error:
            self._log.close()
            raise Absent(f"{python}: {error.strerror}") from error
        hello = self.ask("hello")
        if "result" not in hello:
            self.close()
            raise Absent(next(iter(hello.values())))
        self.about: dict[str, Any] = hello["result"]

    def send(self, method: str, **arguments: Any) -> None:
        """Send a request without waiting."""
        self._write({"method": method, **arguments})

    def _write(self, message: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Return the next answer; if the process has ended, an answer that reports it."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            last = self._log.read().strip().splitlines()[-1:] or ["nothing on standard error"]
            return {"failed": f"the process ended ({last[0]})"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def go_on(self) -> dict[str, Any]:
        """Resume a paused loop; return its next pause, or its answer."""
        self._write("go on")
        return self.receive()

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the answer."""
        self.send(method, **arguments)
        return self.receive()

    def result(self, method: str, **arguments: Any) -> Any:
        """Send a request and return its result.

        Raises:
            RuntimeError: the request failed.
        """
        answer = self.ask(method, **arguments)
        if "result" not in answer:
            raise RuntimeError(f"{self.name}: {method} returned {answer.get('trace') or answer}")
        return answer["result"]

    def another(self) -> Library:
        """Start a second process of the same library."""
        return Library(self.name, self.python, self.device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process."""
        with self._log, self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


class Workplace:
    """The context of a section: the available libraries, the absent ones, and the cases as files.

    Args:
        pythons: for each library by name, a Python other than the default one.
        device: "cpu" or "cuda".
        quick: fewer cases, rounds and steps.
        parts: the parts of the section to run; all of it if None.
    """

    def __init__(
        self, pythons: Mapping[str, str], device: str, quick: bool, parts: Collection[Part] | None = None
    ) -> None:
        self.device, self.quick, self._parts = device, quick, parts
        self._folder = tempfile.TemporaryDirectory()
        self.libraries: list[Library] = []
        self.absent: dict[str, str] = {}
        self._files: dict[str, Path] = {}
        for name, remedy in LIBRARIES.items():
            try:
                self.libraries.append(Library(name, pythons.get(name) or _usual_python(name), device))
            except Absent as error:
                self.absent[name] = f"{error}; remedy: {remedy}"

    def __getitem__(self, name: str) -> Library | None:
        return next((library for library in self.libraries if library.name == name), None)

    def wants(self, case: str, estimator: str | None = None, iterations: int | None = None) -> bool:
        """Return True if the parts to run include a case, an estimator and a number of iterations; None matches all."""
        asked = Part(case, estimator and family(estimator), iterations)
        return self._parts is None or any(
            all(None in (own, other) or own == other for own, other in zip(part, asked, strict=True))
            for part in self._parts
        )

    def case(self, name: str) -> str:
        """Return the file of a case; create it on first use."""
        if name not in self._files:
            self._files[name] = Path(self._folder.name) / f"{len(self._files)}.pt"
            cases.make(name, self._files[name])
        return str(self._files[name])

    def ratios(self, wanted: Sequence[tuple[Library, str]], rounds: int) -> list[float]:
        """Return the time of each call relative to a plain gradient: medians over rounds in which all libraries take turns.

        The plain gradient is timed in the same process just before the call, so that other load on the machine affects both.
        """
        by_call: list[list[float]] = [[] for _ in wanted]
        for _ in range(rounds):
            for (library, key), ratios in zip(wanted, by_call, strict=True):
                plain = library.result("time", key="plain")
                ratios.append(library.result("time", key=key) / plain)
        return [statistics.median(ratios) for ratios in by_call]

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *_: object) -> None:
        """End all processes, and remove the files."""
        with self._folder:
            for library in self.libraries:
                library.close()


def _usual_python(name: str) -> str:
    if name == "mlopt":
        return sys.executable
    python = ROOT / ".peers" / name / "bin" / "python"
    if not python.exists():
        raise Absent(f"no .peers/{name}")
    return str(python)
