"""Hypergradients of ours and of the other libraries, side by side: `python -m benchmarks.hypergrad`.

`cases` and `networks` hold the problems, `exact` the reference, all in plain torch; `adapters` has one file for each library;
`worker` runs in that library's own environment and answers `workers`, which the `sections` speak to; `bar` says what is met.
Nothing outside `adapters/mlopt.py` imports mlopt: the same files run inside every environment.
"""
