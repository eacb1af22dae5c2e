"""Whole training steps, compiled: forward, backward, averaging of gradients over ranks. `plait.train_step`."""

from .api import TrainStep, train_step
from .compiled import CompiledStep

__all__ = ["CompiledStep", "TrainStep", "train_step"]
