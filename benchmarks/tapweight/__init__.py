"""`python -m benchmarks.tapweight [molecules | text]`: TapWeight against direct finetuning and equal weights, and its cost."""
