"""Hypergradients of mlopt and of the other libraries in one run: `python -m benchmarks.hypergrad`.

`cases` and `networks` hold the problems, `exact` the reference, all in plain torch. `adapters` has one file for each library.
A `worker` runs in the environment of its library and answers requests from `workers`, which the `sections` call. `bar` holds the
targets. Nothing outside `adapters/mlopt.py` imports mlopt: the same files run inside every environment.
"""
