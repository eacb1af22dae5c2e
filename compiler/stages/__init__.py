"""Training in pipeline stages: `plait.staged_step`, and stages for `torch.distributed.pipelining`: `plait.torch_stages`."""

from .api import StagedStep, staged_step

__all__ = ["StagedStep", "staged_step"]
