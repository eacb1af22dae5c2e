"""A Mixtral of Hugging Face, tiny and random: rewritten so that ranks share its experts, and trained a few steps.

    torchrun --nproc-per-node 2 examples/moe/mixtral.py
    python examples/moe/mixtral.py --steps 20

Before training it shows that the rewritten model computes what the original does.
"""

from __future__ import annotations

import argparse
import copy
import os
from typing import Any

import plait
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F
from transformers import MixtralConfig, MixtralForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


def loss(model: MixtralForCausalLM, tokens: Tensor) -> Tensor:
    """Cross-entropy of each next token."""
    logits = model(tokens[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def counting(count: int, length: int, seed: int) -> Tensor:
    """Windows of tokens that go up by a step of 1 to 3: [count, length]."""
    generator = torch.Generator().manual_seed(seed)
    first, step = (torch.randint(low, high, (count, 1), generator=generator) for low, high in ((0, 64), (1, 4)))
    return (first + step * torch.arange(length)) % 64


def main() -> None:
    """Rewrite, compare, train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
    parser.add_argument("--capacity-factor", type=float, help="let experts drop tokens behind their last place")
    given = parser.parse_args()
    device, mesh, rank, ranks = torch.device("cpu"), None, 0, 1
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mesh = init_device_mesh(device.type, (ranks,))
    torch.manual_seed(0)  # alike on all ranks: each keeps its part of one model's experts
    original = MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_hidden_layers": given.layers})).to(device)
    model = copy.deepcopy(original)
    plait.moe.rewrite(model, mesh)
    with torch.no_grad():
        tokens = counting(4, 32, seed=1 + rank).to(device)
        difference = (model(tokens).logits - original(tokens).logits).abs().max().item()
    if rank == 0:
        held = model.model.layers[0].mlp.experts.gate_up_proj.shape[0]
        print(f"{ranks} ranks, {held} of {SIZES['num_local_experts']} experts on each")
        print(f"largest difference from the original's logits: {difference:.1e}")
    if given.capacity_factor is not None:
        model = copy.deepcopy(original)
        plait.moe.rewrite(model, mesh, given.capacity_factor)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    step = plait.train_step(model, loss, optimizer, mesh)
    for number in range(given.steps):
        value = step(counting(16, 33, seed=number * ranks + rank).to(device)).item()
        if rank == 0 and (number % 5 == 0 or number + 1 == given.steps):
            print(f"step {number}: loss {value:.4f}", flush=True)
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
