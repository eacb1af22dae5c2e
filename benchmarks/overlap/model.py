"""Letter c: steps of two ranks as the cost model predicts them, against steps that were measured, on links of several rates.

What a prediction knows: the seconds of the plan's steps with nothing on the link; curves of collectives, with nothing
computed beside them, at a slow and a fast rate; and by what factors the two slow each other there. All rates at which steps
are measured are held out, and nothing is fitted to steps that compute and communicate. Beside that the error with curves
that are measured at the very rate.

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
from plait.compiler.predicted import Parts, Prediction, parts_of
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
"""Mbit per second; steps are measured at these, and predicted from curves measured at those of CALIBRATION."""
CALIBRATION = (150.0, 1000.0)
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

    def parts(self, rounds: int) -> Parts:
        """The whole step, with the optimizer."""
        return parts_of(self.step.compiled.executable, lambda: self.step(*self.batch), rounds)


def main() -> None:
    """Run the job on this rank."""
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    config = Config(**job["sizes"])
    rows: list[dict[str, Any]] = []
    for size in job["batches"]:
        (batch,) = batches(config, size, dist.get_rank(), 1)
        settings = [Setting(name, config, mesh, batch) for name in job["variants"]]
        say(f"batch {size}: compiled")
        graph, group = settings[0].step.graph, mesh.get_group()
        ends = [(mbit, link_at(mbit, graph, group)) for mbit in CALIBRATION]
        for mbit in job["rates"]:
            known = {"error": Reached.between(ends[0], ends[1], mbit), "error_anew": link_at(mbit, graph, group)}
            for setting in settings:
                parts = setting.parts(job["rounds"])
                row: dict[str, Any] = {"batch": size, "mbit": mbit, "variant": setting.name}
                for name, one in known.items():
                    found = numbers(parts.on(one))
                    row = found | row | {name: found["predicted_ms"] / found["measured_ms"] - 1}
                rows.append(row)
                say(str(row))
    if dist.get_rank() == 0:
        Path(job["out"]).write_text(json.dumps(rows, indent=1))
    dist.barrier()
    dist.destroy_process_group()


def link_at(mbit: float, graph: Any, group: Any) -> Reached:
    """What the link reaches at a rate, which it keeps."""
    device = os.environ.get("PLAIT_LINK_DEVICE", "")
    dist.barrier()
    if device:
        set_rate(device, mbit)
    dist.barrier()
    found = link(graph, group)
    say(f"{mbit:g} Mbit/s: {found.slowdown}")
    return found


def numbers(found: Prediction) -> dict[str, float]:
    """Milliseconds, means over ranks."""
    means = {"predicted_ms": found.seconds, "measured_ms": found.measured, "exposed_ms": found.exposed}
    return {name: 1e3 * mean_over_ranks(value) for name, value in means.items()}


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
        job |= {"batches": [16], "rates": RATES[1:2], "variants": ["none", "both/2"], "rounds": 5}
    start = time.monotonic()
    rows = run_job(job, 1500.0)
    run.say(f"{time.monotonic() - start:.0f} s")
    if not rows:
        return None
    errors = sorted(abs(r["error"]) for r in rows)
    median = statistics.median(errors)
    figure = {
        "median error": round(median, 4),
        "largest": round(errors[-1], 4),
        "median, curves at the same rate": round(statistics.median(abs(r["error_anew"]) for r in rows), 4),
        "settings": len(rows),
    }
    return Outcome(figure, median <= GOAL, rows)


if __name__ == "__main__":
    main()
