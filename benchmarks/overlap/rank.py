"""One of two ranks: compiles the variants of a training step for a link of given rates, and times them in turns.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=.. MASTER_PORT=.. python -m benchmarks.overlap.rank JOB.json

The job says sizes, variants, shares of communication, repeats; rank 0 writes results beside it. `PLAIT_LINK_DEVICE` is the
device whose rate is set, so that the exchanges of the plain step take the share that is asked for.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plait
import torch
import torch.distributed as dist
from plait.runtime import collectives
from torch.distributed.device_mesh import init_device_mesh

from .network import set_rate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "moe"))
from gpt2_moe import Config, GPT2MoE, loss

TUTEL = [(f"ii/{k}", [f"overlap-chunks:by=capacity,around=layer,count={k}"]) for k in (2, 4, 8)]
VARIANTS: Mapping[str, list[str]] = {
    "i": [],
    **dict(TUTEL),
    "iii": ["overlap-chunks:around=all,count=2"],
    "iv": ["overlap-dw"],
    "v": ["overlap-chunks"],
    "vi": ["overlap-chunks", "overlap-dw"],
}
"""What is compared: (i) no overlap, (ii) experts alone split by capacity as Tutel does, in 2, 4 and 8 parts, forward
and backward, (iii) two pieces everywhere, (iv) weight gradients, (v) pieces, (vi) both."""


@dataclass
class Blocked:
    """Seconds that the computing thread waits for collectives, and seconds that these run, by op."""

    waited: dict[str, float] = field(default_factory=dict[str, float])

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count within the block."""
        plain: Callable[[Any], Any] = collectives.Pending.wait

        def wait(pending: Any) -> Any:
            start = time.perf_counter()
            try:
                return plain(pending)
            finally:
                name = pending._job.name
                self.waited[name] = self.waited.get(name, 0.0) + time.perf_counter() - start

        collectives.Pending.wait = wait  # type: ignore[method-assign]
        try:
            yield
        finally:
            collectives.Pending.wait = plain  # type: ignore[method-assign]


def is_exchange(name: str) -> bool:
    """Whether a collective is an exchange of tokens."""
    return "all_to_all" in name


@dataclass
class Sample:
    """One step: seconds, seconds waited for exchanges and for other collectives, seconds that both kinds ran, bytes."""

    seconds: float
    waited: float
    waited_other: float
    ran: float
    ran_other: float
    sent: int
    loss: float


class Variant:
    """A training step of its own model, from the same seed as all others."""

    def __init__(self, name: str, passes: list[str], config: Config, mesh: Any, options: Mapping[str, Any]) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model = GPT2MoE(config, mesh)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2, momentum=0.9)
        self.step = plait.train_step(self.model, loss, optimizer, mesh, passes=passes, options=options)
        self.samples: list[Sample] = []

    def run(self, batch: Any) -> Sample:
        """One step, timed on this rank from when all ranks are there."""
        dist.barrier()
        blocked = Blocked()
        with collectives.recording() as records, blocked.watching():
            start = time.perf_counter()
            value = self.step(*batch)
            seconds = time.perf_counter() - start
        waited = [sum(s for n, s in blocked.waited.items() if is_exchange(n) == kind) for kind in (True, False)]
        ran = [sum(1e-9 * (r.end - r.start) for r in records if is_exchange(r.name) == kind) for kind in (True, False)]
        sent = sum(r.bytes for r in records if is_exchange(r.name))
        return Sample(seconds, *waited, *ran, sent, float(value))


def batches(config: Config, size: int, rank: int, count: int) -> list[Any]:
    """Random tokens."""
    found: list[Any] = []
    for i in range(count):
        generator = torch.Generator().manual_seed(100 * i + rank)
        x = torch.randint(config.vocabulary, (size, config.context + 1), generator=generator)
        found.append((x[:, :-1].contiguous(), x[:, 1:].contiguous()))
    return found


def mean_over_ranks(value: float) -> float:
    """The mean of a number over ranks."""
    t = torch.tensor([value], dtype=torch.float64)
    dist.all_reduce(t)
    return float(t) / dist.get_world_size()


def main() -> None:
    """Run the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    config = Config(**job["sizes"])
    data = batches(config, job["batch"], dist.get_rank(), 4)
    device = os.environ.get("PLAIT_LINK_DEVICE", "")
    results: dict[str, Any] = {}
    for share in job["shares"]:
        results[str(share)] = measure(job, config, mesh, data, device, share)
        if dist.get_rank() == 0:
            Path(job["out"]).write_text(json.dumps(results, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def measure(job: Mapping[str, Any], config: Config, mesh: Any, data: list[Any], device: str, share: float) -> dict[str, Any]:
    """All variants with exchanges at a share of the plain step."""
    options = job.get("options", {})
    mbit = 0.0
    if device:
        mbit = rate(Variant("i", [], config, mesh, options), data, device, share)
    variants: list[Variant] = []
    compiled: dict[str, float] = {}
    for name in job["variants"]:
        start = time.perf_counter()
        variants.append(Variant(name, VARIANTS[name], config, mesh, options))
        for batch in data[:2]:
            variants[-1].run(batch)
        compiled[name] = time.perf_counter() - start
        say(f"{share}: {name} compiled in {compiled[name]:.1f} s")
    losses: dict[str, list[float]] = {v.name: [] for v in variants}
    for i in range(job["repeats"]):
        turn = variants[i % len(variants) :] + variants[: i % len(variants)]
        for v in turn:
            sample = v.run(data[i % len(data)])
            v.samples.append(sample)
            losses[v.name].append(sample.loss)
    found = {v.name: summary(v) for v in variants}
    for v in variants:
        found[v.name]["losses_equal"] = losses[v.name] == losses["i"]
        found[v.name]["largest_loss_difference"] = max(abs(a - b) for a, b in zip(losses[v.name], losses["i"], strict=True))
        found[v.name]["losses"] = losses[v.name]
        found[v.name]["compile_s"] = compiled[v.name]
        found[v.name]["said"] = [str(s) for s in getattr(v.step.compiled, "said", ())]
    return {"mbit": mbit, "variants": found}


def rate(plain: Variant, data: list[Any], device: str, share: float) -> float:
    """Mbit/s at which the exchanges of a plain step take a share of it; the link is left at that. What they take beyond
    their bytes, such as the time until both ranks are there, is found out at a first rate."""
    mbit = 0.0
    for _ in range(2):
        set_rate(device, mbit)
        dist.barrier()
        samples = [plain.run(data[i % len(data)]) for i in range(7)][2:]
        computing = mean_over_ranks(statistics.median(s.seconds - s.waited - s.waited_other for s in samples))
        other = mean_over_ranks(statistics.median(s.waited_other for s in samples))
        exchanging = mean_over_ranks(statistics.median(s.waited for s in samples))
        sent = 8e-6 * mean_over_ranks(statistics.median(s.sent for s in samples))
        wanted = (computing + other) * share / (1 - share)
        carried = max(sent / mbit + wanted - exchanging, 0.25 * wanted) if mbit else wanted  # seconds for the bytes alone
        mbit = sent / carried
        dist.barrier()
    set_rate(device, mbit)
    dist.barrier()
    return mbit


def summary(v: Variant) -> dict[str, Any]:
    """Medians over repeats, means over ranks; the spread of seconds."""
    found: dict[str, Any] = {}
    for name in ("seconds", "waited", "waited_other", "ran", "ran_other", "sent"):
        found[name] = mean_over_ranks(statistics.median(getattr(s, name) for s in v.samples))
    seconds = sorted(s.seconds for s in v.samples)
    found["p10"], found["p90"] = seconds[len(seconds) // 10], seconds[-1 - len(seconds) // 10]
    found["computing"] = found["seconds"] - found["waited"] - found["waited_other"]
    return found


def say(text: str) -> None:
    """Progress, on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
