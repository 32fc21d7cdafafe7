"""Parts of `benchmarks/train_step.py`."""
