"""A small Llama that reads bytes, trained here, and given what makes large ones hard to quantize: outlier channels.

    python examples/quantize/tiny_llama.py --checkpoint tiny.pt          # minutes, once; an interrupted run goes on
    python examples/quantize/tiny_llama.py --steps 20 --layers 1

A few channels of each activation get tens of times larger and the weights that read them as much smaller. The model computes
what it did, but rounding its weights to the nearest code now loses those channels, as where training made such ones. After
800 steps on Shakespeare's works, perplexity of a byte of Hamlet: 5.479; with 4 bits, groups of 128: 5.491 as trained, 5.736
with outliers.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from pathlib import Path
from typing import Any

import torch
from llama import Llama, LlamaConfig, perplexity
from plait.formats.quantized import QuantizedType, rounded
from texts import read
from torch import Tensor, nn
from torch.nn import functional as F

CONFIG = LlamaConfig(vocabulary=256, hidden=256, layers=6, heads=4, kv_heads=2, intermediate=768, context=256)
SCHEMES = ((4, 128), (4, 32), (3, 128), (3, 32))


def encode(text: str) -> Tensor:
    """The tokens of a text: its bytes."""
    return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()


def train(
    text: str, config: LlamaConfig = CONFIG, steps: int = 800, batch: int = 8, seed: int = 0, checkpoint: Path | None = None
) -> Llama:
    """A model trained with AdamW on windows of `config.context` bytes of a text.

    With a checkpoint the run can be interrupted: the next one with the same settings goes on where the file ends, and gives
    the same model at once when it is complete. Progress goes to a terminal, if there is one.
    """
    torch.manual_seed(seed)
    model, tokens = Llama(config), encode(text)
    for weight in (p for p in model.parameters() if p.dim() == 2):
        nn.init.normal_(weight, std=0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps + 1, pct_start=0.1)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}
    settings = f"{config}, {steps} steps of {batch}, seed {seed}, {len(tokens)} bytes"
    done = 0
    if checkpoint is not None and checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["settings"] == settings:
            done = saved["done"]
            for name, part in parts.items():
                part.load_state_dict(saved[name])
    half = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # elsewhere bfloat16 is slower than float32
    for step in range(done, steps):
        windows = torch.Generator().manual_seed(seed * 1_000_003 + step)  # of each step: a resumed run draws the same
        starts = torch.randint(len(tokens) - config.context, (batch, 1), generator=windows)
        chosen = tokens[starts + torch.arange(config.context + 1)]
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(chosen[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1).float(), chosen[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if sys.stderr.isatty():
            print(f"\rstep {step + 1} of {steps}, loss {loss.item():.3f} ", end="", file=sys.stderr, flush=True)
        if checkpoint is not None and ((step + 1) % 50 == 0 or step + 1 == steps):
            state = {name: part.state_dict() for name, part in parts.items()}
            unfinished = checkpoint.with_name(f"{checkpoint.name}.{os.getpid()}")
            torch.save({"settings": settings, "done": step + 1, **state}, unfinished)
            unfinished.replace(checkpoint)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    return model.eval().requires_grad_(False)


def inject_outliers(model: Llama, fraction: float = 0.02, factor: float = 32.0) -> Llama:
    """A model that computes the same, with a fraction of the channels of each activation `factor` times as large.

    The channels are what linears read: the results of both norms of a layer, attention's mixed values, and the product
    inside the MLP. What gives a channel is multiplied (a norm's weight, a row of v_proj or up_proj), columns that read it
    are divided. Heads that share values share their channels. Those that the weights say matter most are chosen, as large
    activations matter most in large models.
    """
    model = copy.deepcopy(model)

    def grow(source: Tensor, readers: list[Tensor], copies: Tensor | None = None) -> None:
        columns = torch.arange(len(source))[:, None] if copies is None else copies
        given = source.abs() if source.dim() == 1 else source.norm(dim=1)
        weight = given * sum(w[:, columns].pow(2).sum((0, 2)) for w in readers) ** 0.5
        chosen = weight.topk(max(1, round(fraction * len(source)))).indices
        source[chosen] *= factor
        for w in readers:
            w[:, columns[chosen].flatten()] /= factor

    size, shared = model.config.head_size, model.config.heads // model.config.kv_heads
    columns = torch.arange(model.config.heads * size).view(model.config.kv_heads, shared, size)
    copies = columns.transpose(1, 2).reshape(-1, shared)  # of a channel of the values: what o_proj reads of it
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            queries = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            grow(layer.input_layernorm.weight, queries)
            grow(attention.v_proj.weight, [attention.o_proj.weight], copies)
            grow(layer.post_attention_layernorm.weight, [mlp.gate_proj.weight, mlp.up_proj.weight])
            grow(mlp.up_proj.weight, [mlp.down_proj.weight])
    return model


def round_to_nearest(model: Llama, bits: int, group: int) -> Llama:
    """A copy whose layers have the nearest weights of so many bits; the embedding and the head stay as they are."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, nn.Linear):
                kind = QuantizedType(tuple(module.weight.shape), bits, group, layout="rows")
                module.weight.copy_(rounded(module.weight, kind))
    return model


def main() -> None:
    """Train, then print perplexities of the model as it is and rounded, without and with outliers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--layers", type=int, default=CONFIG.layers)
    parser.add_argument("--fraction", type=float, default=0.02, help="of the channels that become outliers")
    parser.add_argument("--factor", type=float, default=32.0, help="by which they grow")
    parser.add_argument("--tokens", type=int, default=16384, help="of the evaluation text")
    given = parser.parse_args()
    texts, config = read(), LlamaConfig(**{**vars(CONFIG), "layers": given.layers})
    model = train(texts.training, config, given.steps, checkpoint=given.checkpoint)
    tokens = encode(texts.evaluation)[: given.tokens]
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {texts.source}, perplexity of a byte")
    print("                 as it is" + "".join(f"   {bits} bits, g{group:<3}" for bits, group in SCHEMES))
    for name, m in (("trained", model), ("with outliers", inject_outliers(model, given.fraction, given.factor))):
        found = [perplexity(m, tokens, config.context)]
        found += [perplexity(round_to_nearest(m, *s), tokens, config.context) for s in SCHEMES]
        print(f"{name:14}" + "".join(f" {x:13.3f}" for x in found))


if __name__ == "__main__":
    main()
