"""Low-bit rewrites: observing a graph on calibration data, transforming its constants, and the passes that quantize it."""

from . import pack, weights

__all__ = ["pack", "weights"]
