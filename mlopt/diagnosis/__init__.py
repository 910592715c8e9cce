"""Trust in an estimator on a problem: a check against an oracle, and a diagnosis before a long run."""

from .check import Check, DisagreementError, Row, check_hypergradient
from .diagnosis import Diagnosis, LevelDiagnosis, diagnose
from .finding import Finding
from .requirements import LevelRequirements, Requirements, estimate_requirements

__all__ = [
    "Check",
    "Diagnosis",
    "DisagreementError",
    "Finding",
    "LevelDiagnosis",
    "LevelRequirements",
    "Requirements",
    "Row",
    "check_hypergradient",
    "diagnose",
    "estimate_requirements",
]
