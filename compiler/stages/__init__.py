"""Training in pipeline stages: `plait.staged_step`."""

from .api import StagedStep, staged_step

__all__ = ["StagedStep", "staged_step"]
