"""Hiding communication behind computation."""

from . import chunks, weights

__all__ = ["chunks", "weights"]
