"""Train a GPT-2 with mixtures of experts on characters; experts are spread over ranks, all else is data-parallel.

    torchrun --nproc-per-node 2 examples/moe/train_gpt2_moe.py --steps 50
    torchrun --nproc-per-node 2 examples/moe/train_gpt2_moe.py --steps 50 --eager
    python examples/moe/train_gpt2_moe.py --data book.txt --gate batch-prioritised --capacity-factor 2

The whole step (forward, backward, averaging of gradients) is one compiled graph; with `--overlap` its all-to-alls run beside
computation: `dw` moves weight gradients there, `chunks` takes tokens in pieces. Gates that see the whole batch
(`batch-prioritised`) are split only behind the gate.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import plait
import torch
import torch.distributed as dist
from gpt2_moe import Config, GPT2MoE, Text, loss, sentences
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh


def passes(overlap: str, pieces: int) -> list[str]:
    """The passes of a compiled step. Without `pieces` it is cut only where that is expected to be faster."""
    chunks = [f"overlap-chunks:count={pieces}" if pieces else "overlap-chunks"]
    return {"none": [], "dw": ["overlap-dw"], "chunks": chunks, "both": [*chunks, "overlap-dw"]}[overlap]


class EagerStep:
    """What a compiled step does, in eager mode: gradients of shared parameters are averaged over the ranks."""

    def __init__(self, model: GPT2MoE, optimizer: torch.optim.Optimizer, ranks: int) -> None:
        self.model, self.optimizer, self.ranks = model, optimizer, ranks

    def __call__(self, *batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        value = loss(self.model, *batch)
        value.backward()
        for p in self.model.parameters():
            if self.ranks > 1 and p.grad is not None:
                if not getattr(p, "plait_local", False):
                    dist.all_reduce(p.grad)
                p.grad /= self.ranks  # an expert's gradient has come from the tokens of all ranks already
        self.optimizer.step()
        return value.detach()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="windows of each rank and step")
    parser.add_argument("--context", type=int, default=Config.context, help="characters of a window")
    for name in ("width", "heads", "layers", "hidden", "experts"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Config, name))
    parser.add_argument("--gate", default=Config.gate, choices=list(plait.moe.GATES))
    parser.add_argument("--capacity-factor", type=float, default=Config.capacity_factor)
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--data", type=Path, help="a text; without one, sentences are made up")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--overlap", default="none", choices=["none", "dw", "chunks", "both"])
    parser.add_argument("--pieces", type=int, default=0, help="of chunks, 0: as many as are expected to be fastest")
    parser.add_argument("--every", type=int, default=10, help="steps between printed lines")
    parser.add_argument("--report", type=Path, help="write an HTML page about the compiled step")
    return parser.parse_args()


def main() -> None:
    """Train, and print loss and speed on rank 0."""
    given = arguments()
    device, mesh, rank, ranks = torch.device("cpu"), None, 0, 1
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh(device.type, (ranks,))
    text = Text(given.data.read_text() if given.data else sentences())
    sizes = {k: getattr(given, k) for k in ("width", "heads", "layers", "hidden", "experts", "gate", "context")}
    config = Config(len(text.characters), capacity_factor=given.capacity_factor, **sizes)
    torch.manual_seed(0)  # alike on all ranks: they start from one model
    model = GPT2MoE(config, mesh).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), given.rate)
    step: Any = EagerStep(model, optimizer, ranks)
    if not given.eager:
        step = plait.train_step(model, loss, optimizer, mesh, passes=passes(given.overlap, given.pieces))
    if rank == 0:
        count = sum(p.numel() * (ranks if getattr(p, "plait_local", False) else 1) for p in model.parameters())
        how = "eager" if given.eager else "compiled"
        print(f"{count / 1e6:.2f} M parameters, {config.experts} experts, {given.gate}, {ranks} ranks, {how}", flush=True)
    started, first = time.perf_counter(), 0
    for number in range(given.steps):
        x, y = text.batch(given.batch, given.context, seed=number * ranks + rank)
        value = step(x.to(device), y.to(device))
        if number == 0 and rank == 0 and not given.eager:
            for done in (s for s in step.compiled.history if s.pass_name.startswith("overlap")):
                said = [f"{rule} x{count}" for rule, count in done.fired.items()]
                said += sorted({f"not everywhere: {why}" for _, _, why in done.refused})
                print(f"{done.pass_name}: {'; '.join(said) or 'nothing to do'}")
        if number % given.every == 0 or number + 1 == given.steps:
            mean = value.clone()
            if ranks > 1:
                dist.all_reduce(mean)
            shown, now = mean.item() / ranks, time.perf_counter()
            speed = (number - first) * ranks * x.numel() / (now - started)
            if rank == 0:
                print(f"step {number}: loss {shown:.4f}" + (f", {speed:.0f} tokens/s" if number else ""), flush=True)
            started, first = time.perf_counter(), number
    if given.report and rank == 0 and not given.eager:
        step.report(given.report)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
