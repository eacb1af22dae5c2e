"""Pipeline stages: where to cut a model, and what to compute in bubbles."""

from .stages import Stages, StagesReport

__all__ = ["Stages", "StagesReport"]
