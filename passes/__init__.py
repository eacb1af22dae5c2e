"""Graph passes: the base class, the registry, and one module for each pass."""

from . import prune as _prune
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

assert _prune is not None  # imported to register their passes

__all__ = [
    "PASSES", "CapturePoint", "Context", "Numerics", "OptionInfo", "Pass", "Step", "approximate", "describe", "exact",
    "find", "make", "map_regions", "option", "parse", "reassociates", "register", "run_pipeline", "summary",
]  # fmt: skip
