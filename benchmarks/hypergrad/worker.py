"""A process in one library's environment that answers requests: `python -m benchmarks.hypergrad.worker LIBRARY DEVICE`.

A request is a line of JSON, {"method": ..., arguments}, on standard input; the answer a line on standard output: {"result": ...},
{"unsupported": sentence} if the library does not offer the estimator, or {"failed": sentence, "trace": ...}. The output of the
library itself goes to standard error.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TextIO

import torch
from torch import Tensor

from ..report import clock
from . import cases, exact, graphs
from .adapters import Unsupported, adapter, alternate
from .measuring import flops, peak_memory, release

#: A call shorter than this, in seconds, is repeated within one timing.
SHORTEST = 0.02
#: The most bytes of a process on a CPU: a call that needs more fails, with a note in its row, before the machine runs out.
MOST = 8 * 2**30


class Worker:
    """The requests that a library answers.

    Args:
        library: its name among the adapters.
        device: "cpu" or "cuda".
        channel: the stream of requests from the parent, and the stream of answers to it.
    """

    def __init__(self, library: str, device: str, channel: tuple[TextIO, TextIO]) -> None:
        self.device, self.channel = device, channel
        self.adapter = adapter(library)
        self.calls: dict[str, Callable[[], Any]] = {}
        self.repeats: dict[str, int] = {}
        self.start: list[Tensor] = []

    def hello(self) -> dict[str, Any]:
        """Return the library's version and the names of its estimators."""
        try:
            version = importlib.metadata.version(self.adapter.VERSION)
        except importlib.metadata.PackageNotFoundError:
            version = "from a repository"
        return {
            "version": version,
            "torch": torch.__version__,
            "estimators": list(self.adapter.ESTIMATORS),
            "loops": list(self.adapter.LOOPS),
            "graphs": list(getattr(self.adapter, "GRAPHS", [])),
        }

    def load(self, file: str, dtype: str | None = None, outer_dtype: str | None = None) -> None:
        """Read a case; its plain gradient is the unit of time."""
        double = cases.load(file)
        kind = cases.RECIPES[double.name].dtype if dtype is None else getattr(torch, dtype)
        outer = None if outer_dtype is None else getattr(torch, outer_dtype)
        self.double = double
        self.case = double.to(kind, self.device, outer=outer)
        self.start = [variable.detach().clone() for variable in [*self.case.x, *self.case.u]]
        self.calls, self.repeats = {}, {}
        self._know("plain", self.case.plain_gradient)

    def build(self, key: str, estimator: str, iterations: int) -> None:
        """Build a call of an estimator and store it under a key."""
        self._know(key, self.adapter.ESTIMATORS[estimator](self.case, iterations))

    def error(self, key: str, against: str = "exact") -> dict[str, float]:
        """Call once; return the relative error and the cosine to a reference of the case."""
        gradient = self._call(key).double().cpu()
        return _compare(gradient, getattr(self.double, against))

    def bfloat16_error(self, key: str) -> float:
        """Call once; return the error of a product at the rounded point, against float64 at that point."""
        truth = exact.hypergradient(self.case.to(torch.float64), identity=True)[0]
        return _compare(self._call(key).double().cpu(), truth)["error"]

    def repeats_of(self, key: str, count: int) -> list[list[float]]:
        """Return the hypergradients of `count` calls, each with its own seed."""
        gradients = []
        for seed in range(count):
            torch.manual_seed(1_000 + seed)
            gradients.append(self._call(key).double().tolist())
        return gradients

    def cost(self, key: str) -> dict[str, float]:
        """Return the operations and the peak memory of one call."""
        counted = {"flops": flops(self.calls[key])}
        self._restore()
        counted["memory"] = peak_memory(self.calls[key], self.device)
        self._restore()
        return counted

    def memory(self, key: str) -> int:
        """Return the peak memory of one call."""
        peak = peak_memory(self.calls[key], self.device)
        self._restore()
        release()  # the profiler's events take more memory than most calls
        return peak

    def time(self, key: str) -> float:
        """Return the seconds of one call, the mean of several if it is very short; the first request warms up with one call."""
        if key not in self.repeats:
            begin = clock(self.device)
            self._call(key)
            self.repeats[key] = max(1, round(SHORTEST / max(clock(self.device) - begin, 1e-5)))
        begin = clock(self.device)
        for _ in range(self.repeats[key]):
            self.calls[key]()
        spent = clock(self.device) - begin
        self._restore()
        return spent / self.repeats[key]

    def loop(self, setting: str, iterations: int, steps: int, every: int) -> dict[str, float]:
        """Run the loop; every `every` steps compare with the exact hypergradient and wait for the parent to resume."""
        watch = _Watch(self, every)
        if hasattr(self.adapter, "loop"):
            self.adapter.loop(self.case, setting, steps, watch)
        else:
            alternate(self.case, self.adapter.LOOPS[setting](self.case, iterations), steps, watch)
        spent = watch.stop()
        self._restore()
        return {"seconds": spent / (steps - 1), "error": statistics.median(watch.errors), "worst": max(watch.errors)}

    def graph(self, key: str, shape: str, size: int, estimator: str, iterations: int = 0) -> None:
        """Build a call on a graph of quadratic levels; they are small, so it runs on the CPU for every device."""
        self.case_graph = graphs.Graph(graphs.shape(shape), size)
        self.start = []
        self._know(key, self.adapter.GRAPHS[estimator](self.case_graph, iterations))

    def graph_error(self, key: str) -> dict[str, float]:
        """Return the error of a call on the latest graph."""
        return _compare(self.calls[key]().double().cpu(), self.case_graph.exact())

    def closed_form(self, shape: str, estimator: str) -> float:
        """Return the error of mlopt on a shape of `mlopt.testing`."""
        return self.adapter.closed_form(shape, estimator)

    def _know(self, key: str, call: Callable[[], Any]) -> None:
        self.calls[key] = call
        self.repeats.pop(key, None)

    def _call(self, key: str) -> Any:
        result = self.calls[key]()
        self._restore()
        return result

    def _restore(self) -> None:
        """Restore the variables; some libraries change them."""
        if self.start:
            with torch.no_grad():
                for variable, kept in zip([*self.case.x, *self.case.u], self.start, strict=True):
                    variable.copy_(kept)


class _Watch:
    """Called before each outer step: keeps the time, and every `every` steps measures the error with the clock stopped."""

    def __init__(self, worker: Worker, every: int) -> None:
        self._worker, self._every, self._count = worker, every, 0
        self._solved: Tensor | None = None
        self._spent, self._since = 0.0, clock(worker.device)
        self.errors: list[float] = []

    def __call__(self) -> None:
        self._count += 1
        if self._count == 1:
            self._spent, self._since = 0.0, clock(self._worker.device)
        if self._count % self._every:
            return
        self._spent += clock(self._worker.device) - self._since
        case = self._worker.case
        gradient = cases.flat([variable.grad for variable in case.u]).double().cpu()
        truth, self._solved = exact.hypergradient(case.to(torch.float64), start=self._solved, rtol=1e-6)
        self.errors.append(_compare(gradient, truth)["error"])
        say, listen = self._worker.channel[1], self._worker.channel[0]
        print(json.dumps({"pause": self._count}), file=say, flush=True)
        listen.readline()
        self._since = clock(self._worker.device)

    def stop(self) -> float:
        """Return the seconds without the measurements."""
        return self._spent + clock(self._worker.device) - self._since


def _compare(gradient: Tensor, truth: Tensor) -> dict[str, float]:
    error = float((gradient - truth).norm() / truth.norm())
    return {"error": error, "cosine": float(torch.cosine_similarity(gradient, truth, dim=0))}


def main() -> None:
    """Answer requests until the stream ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of the library must not be read as an answer
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    library, device = sys.argv[1:]
    if device == "cpu":
        resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
    worker: Worker | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            worker = worker or Worker(library, device, (sys.stdin, answers))
            answer = {"result": getattr(worker, request.pop("method"))(**request)}
        except Unsupported as error:
            answer = {"unsupported": str(error)}
        except Exception as error:  # the parent reports it: a failure is a row of the table
            text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            answer = {"failed": text, "trace": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
