"""Measurements of plait against PyTorch. `python -m benchmarks --list` says what there is; see `__main__.py`."""
