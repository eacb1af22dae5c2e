"""One of two ranks that train until something befalls them, and tell what.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=.. MASTER_PORT=.. python -m benchmarks.overlap.fault_rank FOLDER

The folder has a job.json: `passes` of each rank, the `gate`, the `timeout` from the first step on, and whether the run
`ends`. Lines go to toldRANK.jsonl there, each with the time `at` of a clock that all processes of a machine share: "asks"
when this rank is ready to compare plans, "loss" after the first step, "code" of an error and of the next call `then`; at the
end whether losses were "equal" to those of the plain step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import plait
import torch
import torch.distributed as dist
from plait.errors import PlaitError
from plait.runtime.collectives import VARIABLE, Channel
from torch import Tensor, nn

WIDTH, HIDDEN, EXPERTS, TOKENS = 32, 64, 4, 64
STEPS = 20
CLOSE = 1e-5
"""Relative difference of losses."""


@dataclass(frozen=True)
class Barred:
    """The most probable expert but the last one, which gets no tokens."""

    choices: int = 1

    def __call__(self, probabilities: Tensor) -> plait.moe.Routing:
        weight, choice = torch.topk(probabilities[:, :-1], 1)
        return plait.moe.Routing(choice, weight)


class Net(nn.Module):
    """Two mixtures with linear layers around them."""

    def __init__(self, gate: Any, group: Any) -> None:
        super().__init__()
        self.mixtures = nn.ModuleList(plait.moe.MoE(WIDTH, HIDDEN, EXPERTS, gate, 1.25, group) for _ in range(2))
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for mixture in self.mixtures:
            x = x + mixture(x)
        return self.last(x)


def loss(model: Net, x: Tensor) -> Tensor:
    """Some loss."""
    return model(x).square().mean()


def made(gate: str, passes: list[str], group: Any) -> Any:
    """A training step, each time of the same model."""
    torch.manual_seed(0)
    model = Net(Barred() if gate == "barred" else gate, group)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return plait.train_step(model, loss, optimizer, group, passes=passes)


@contextmanager
def asking(tell: Any) -> Iterator[None]:
    """Tell when this rank compares its plan with those of the others."""
    plain = Channel.agree

    def agree(channel: Channel, digest: str, text: str) -> None:
        tell(asks=digest)
        plain(channel, digest, text)

    Channel.agree = agree  # type: ignore[method-assign]
    try:
        yield
    finally:
        Channel.agree = plain  # type: ignore[method-assign]


def main() -> None:
    """Do the job."""
    where, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    job = json.loads((where / "job.json").read_text())

    def tell(**line: Any) -> None:
        with (where / f"told{rank}.jsonl").open("a") as f:
            f.write(json.dumps({"at": time.monotonic(), **line}) + "\n")

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    group = dist.group.WORLD
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(rank))
    step = made(job["gate"], [job["passes"][rank]], group)
    if job["ends"]:
        plain = made(job["gate"], [], group)
        pairs = [(step(x).item(), plain(x).item()) for _ in range(STEPS)]
        tell(equal=all(abs(a - b) <= CLOSE * abs(b) for a, b in pairs), losses=pairs)
        return
    try:
        with asking(tell):
            tell(loss=step(x).item())
            os.environ[VARIABLE] = str(job["timeout"])  # not before: ranks need not have compiled at the same time
            while True:
                step(x)
    except PlaitError as error:
        at = time.monotonic()
        try:
            step(x)
            then = ""
        except PlaitError as again:
            then = again.code
        tell(at=at, code=error.code, then=then, message=str(error))


if __name__ == "__main__":
    main()
