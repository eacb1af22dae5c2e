"""Pipeline stages: planning against brute force, simulated clusters."""

from __future__ import annotations

from ..runner import Letter, Suite
from ..stages import clusters, optimum

SUITE = Suite(
    "stages",
    "cut models into pipeline stages and fill their bubbles with frozen layers",
    (
        Letter(
            "a",
            "partitions of small problems (up to 8 layers, 4 stages, replicas, two backbones, self-conditioning, memory) "
            "against brute force; planning 64 devices and 200 layers",
            "equal on all; planning takes less than 10 s",
            optimum.measure,
            sample="a hundred problems; 16 devices and 60 layers",
            seconds=12.0,
        ),
        Letter(
            "b",
            "diffusion models on 8 to 64 simulated A100, calibrated to DiffusionPipe's report: bubbles, ablations, ratios "
            "over GPipe and data parallelism",
            "bubbles below 5 %; ablations in the paper's order; ControlNet on 64 GPUs 1.41x GPipe, 1.28x data parallelism",
            clusters.measure,
            sample="ControlNet on 64 GPUs",
            seconds=8.0,
        ),
    ),
)
