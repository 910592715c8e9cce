"""The processes that a launcher such as torchrun started, for the command line."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

from .errors import MloptError, ProblemError
from .notices import noticed
from .ranks import launched

__all__ = ["EchoError", "joined", "require_alone"]


class EchoError(MloptError):
    """An error that another process reports."""


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Let the processes that a launcher such as torchrun started be a group inside; each takes one GPU, if there are any.

    The group is one of gloo, for plain values: processes that exchange vectors on GPUs make a group of NCCL instead. If one ends
    by an error, the others raise it where they wait for it.

    Raises:
        ProblemError: the processes cannot form a group.
        EchoError: in place of an error that another process has raised before.
    """
    if dist.is_available() and dist.is_initialized():
        with _reported():
            yield
        return
    if launched() == 1:
        yield
        return
    if count := torch.cuda.device_count() if torch.cuda.is_available() else 0:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % count)
    try:
        dist.init_process_group("gloo")
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ProblemError(
            f"the {launched()} processes of the launcher cannot form a group ({reason}); start them with torchrun, or set RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT for each"
        ) from error
    try:
        with _reported():
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _reported() -> Iterator[None]:
    """Report an error that leaves this context to the other processes; of errors with one cause, one process raises its own."""
    with noticed() as post:
        try:
            yield
        except BaseException as error:
            first = post(error)
            alike = first is not None and (first.text in str(error) or str(error) in first.text)
            if alike and isinstance(error, (MloptError, OSError)):
                raise EchoError(str(error)) from error
            raise


def require_alone(what: str) -> None:
    """Raise if this is one of several processes, of a group or of a launcher, for what writes files of its own.

    Raises:
        ProblemError: it is.
    """
    grouped = dist.is_available() and dist.is_initialized()
    if (count := dist.get_world_size() if grouped else launched()) > 1:
        raise ProblemError(
            f"{what} runs in one process, and this is one of {count}, which would all write to the same files; start it without "
            "the launcher"
        )
