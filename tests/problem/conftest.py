"""The tests of this folder run in float64 on one thread."""

from double_precision import one_thread_in_double_precision

__all__ = ["one_thread_in_double_precision"]
