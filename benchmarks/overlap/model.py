"""Letter c: steps of two ranks as the cost model predicts them, against steps that were measured, on links of several rates.

What a prediction knows: the seconds of the plan's steps with nothing on the link, curves of collectives on this link with
nothing computed beside them, and by what factors the two slow each other. Nothing is fitted to steps with both, so that
every combination of rate, batch size and passes is held out.

    python -m benchmarks.overlap.model JOB.json      # one rank, told by RANK, MASTER_ADDR, .. like `rank`
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plait
import torch
import torch.distributed as dist
from plait.compiler.costs import Link as Reached
from plait.compiler.costs import link
from plait.compiler.predicted import Prediction, predict
from torch.distributed.device_mesh import init_device_mesh

from ..runner import Outcome, Run
from .network import Link, finish, folder, set_rate
from .rank import batches, mean_over_ranks, say

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "moe"))
from gpt2_moe import Config, GPT2MoE, loss

SIZES = {
    "vocabulary": 96, "width": 128, "heads": 4, "layers": 4, "context": 128, "hidden": 512, "experts": 4,
}  # fmt: skip
VARIANTS: Mapping[str, list[str]] = {
    "none": [],
    "dw": ["overlap-dw"],
    "chunks/2": ["overlap-chunks:around=layer,count=2"],
    "chunks/4": ["overlap-chunks:around=layer,count=4"],
    "both/2": ["overlap-chunks:around=layer,count=2", "overlap-dw"],
    "both/4": ["overlap-chunks:around=layer,count=4", "overlap-dw"],
}
RATES = (200.0, 400.0, 800.0)
"""Mbit per second."""
GOAL = 0.05
ROOT = Path(__file__).resolve().parents[2]


class Setting:
    """A training step with its own model, and a batch for it."""

    def __init__(self, name: str, config: Config, mesh: Any, batch: Any) -> None:
        torch.manual_seed(0)
        model = GPT2MoE(config, mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.name, self.batch = name, batch
        self.step = plait.train_step(model, loss, optimizer, mesh, passes=VARIANTS[name])
        self.step(*batch)

    def predicted(self, known: Reached, rounds: int) -> Prediction:
        """The whole step, with the optimizer."""
        return predict(self.step.compiled.compiled, lambda: self.step(*self.batch), known=known, rounds=rounds)


def main() -> None:
    """Run the job on this rank."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    config = Config(**job["sizes"])
    device = os.environ.get("PLAIT_LINK_DEVICE", "")
    rows: list[dict[str, Any]] = []
    for size in job["batches"]:
        (batch,) = batches(config, size, dist.get_rank(), 1)
        settings = [Setting(name, config, mesh, batch) for name in job["variants"]]
        say(f"batch {size}: compiled")
        for mbit in job["rates"]:
            dist.barrier()
            if device:
                set_rate(device, mbit)
            dist.barrier()
            known = link(settings[0].step.graph, mesh.get_group())
            say(f"{mbit:g} Mbit/s: {known}")
            for setting in settings:
                found = setting.predicted(known, job["rounds"])
                rows.append({"batch": size, "mbit": mbit, "variant": setting.name, **numbers(found)})
                say(str(rows[-1]))
    if dist.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps(rows, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def numbers(found: Prediction) -> dict[str, float]:
    """Means over ranks; milliseconds, and the signed error."""
    seconds, measured = mean_over_ranks(found.seconds), mean_over_ranks(found.measured)
    return {
        "predicted_ms": 1e3 * seconds,
        "measured_ms": 1e3 * measured,
        "exposed_ms": 1e3 * mean_over_ranks(found.exposed),
        "error": seconds / measured - 1,
    }


def run_job(job: Mapping[str, Any], timeout: float) -> list[dict[str, Any]] | None:
    """Rows of a job on two ranks with a link between them; None where there can be no link, or a rank failed."""
    where = folder()
    path, out = where / "job.json", where / "rows.json"
    path.write_text(json.dumps({**job, "out": str(out)}))
    environment = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT.parent, ROOT)))}
    with Link() as made:
        ranks = made.start([sys.executable, "-m", "benchmarks.overlap.model", str(path)], where, environment)
        codes = finish(ranks, timeout)
    if any(codes):
        print((where / "rank0.log").read_text()[-3000:], file=sys.stderr)
        return None
    return json.loads(out.read_text())


def measure(run: Run) -> Outcome | None:
    """The median of absolute errors over all settings."""
    if not Link.available():
        return None
    job: dict[str, Any] = {"sizes": SIZES, "batches": [16, 32], "rates": RATES, "variants": list(VARIANTS), "rounds": 11}
    if run.quick:
        job |= {"sizes": {**SIZES, "layers": 2}, "batches": [16], "rates": RATES[1:2], "variants": ["both/2"], "rounds": 5}
    start = time.monotonic()
    rows = run_job(job, 1500.0)
    run.say(f"{time.monotonic() - start:.0f} s")
    if not rows:
        return None
    errors = sorted(abs(r["error"]) for r in rows)
    median = statistics.median(errors)
    figure = {"median error": round(median, 4), "largest": round(errors[-1], 4), "settings": len(rows)}
    return Outcome(figure, median <= GOAL, rows)


if __name__ == "__main__":
    main()
