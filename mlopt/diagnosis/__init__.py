"""What lets a user trust an estimator on a problem: checks against an oracle, and an examination before a long run."""

from .check import Check, DisagreementError, Row, check_hypergradient



__all__ = [
    "Check",
    "DisagreementError",
    "Row",
    "check_hypergradient",
]
