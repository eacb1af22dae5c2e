"""Graph passes: the base class, the registry, and one module for each pass."""

from . import attention, channels_last, fold, layout, normalise, overlap, prune, quantize, share, simplify, stages
from .base import (
    PASSES,
    CapturePoint,
    Context,
    Numerics,
    Pass,
    Step,
    approximate,
    exact,
    map_regions,
    option,
    reassociates,
    register,
    run_pipeline,
)
from .registry import OptionInfo, describe, find, make, parse, summary

__all__ = [
    "PASSES", "CapturePoint", "Context", "Numerics", "OptionInfo", "Pass", "Step", "approximate", "attention",
    "channels_last", "describe", "exact", "find", "fold", "layout", "make", "map_regions", "normalise", "option", "overlap",
    "parse", "prune", "quantize", "reassociates", "register", "run_pipeline", "share", "simplify", "stages", "summary",
]  # fmt: skip
