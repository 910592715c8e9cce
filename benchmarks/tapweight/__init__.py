"""`python -m benchmarks.tapweight {molecules | text | report | cost}`: the study of methods that weigh pretraining objectives."""
