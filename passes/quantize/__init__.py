"""Low-bit rewrites: observing a graph on calibration data, transforming its constants, and the passes that quantize it."""

from . import weights

__all__ = ["weights"]
