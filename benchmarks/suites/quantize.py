"""Low-bit weights: accuracy, speed, bytes, properties, gradients."""

from __future__ import annotations

from ..quantization import accuracy, gradients, properties, sizes, speed
from ..runner import Letter, Suite

SUITE = Suite(
    "quantize",
    "weights of a few bits: what they cost in accuracy and what they are worth in time and bytes",
    (
        Letter(
            "a",
            "perplexity of SmolLM2 and the small Llama, rounded and by AWQ, W4 and W3 in groups of 128 and 32; sentence "
            "embeddings; losses of layers beside AutoAWQ's algorithm and torchao",
            "AWQ closes 50 % (W4) and 35 % (W3) of each gap of rounding to nearest; MiniLM keeps a cosine of 0.995 at W4; "
            "no loss above a peer's",
            accuracy.measure,
            sample="two layers of the small Llama with outliers, groups of 128, less text",
            seconds=18.0,
        ),
        Letter(
            "b",
            "times beside eager, Inductor, torch's 4-bit kernel and llama.cpp, with one thread and with two",
            "decoding with weights that no cache holds: W4 3x eager float32, 1.5x eager bfloat16, each product not behind "
            "torch's kernel; W8A8 1.5x plait's float32 at 64 and 256 tokens; nothing slower than float at 1 to 512 rows",
            speed.measure,
            sample="one product beside torch's kernel",
            seconds=8.0,
        ),
        Letter(
            "c",
            "bits of a quantized weight of SmolLM2 at W4 in groups of 128, in the artifact and in memory",
            "4.2 bits; embeddings listed apart",
            sizes.measure,
            sample="one layer of 1536 columns",
            seconds=6.0,
        ),
        Letter(
            "d",
            "1,000 random types through every layout and rounding; factors moved through 200 generated models in float64",
            "nothing lost, no error beyond its bound, every function kept",
            properties.measure,
            sample="a tenth",
            seconds=5.0,
        ),
        Letter(
            "e",
            "gradients and ten Adam steps through rounded weights beside a straight-through reference",
            "equal to 1e-3",
            gradients.measure,
            sample="one pass",
            seconds=6.0,
        ),
    ),
)
