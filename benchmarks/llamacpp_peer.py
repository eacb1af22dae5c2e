"""llama.cpp as a peer: how fast it generates with the 4-bit weights of a GGUF file.

It is built from the source distribution of its Python package, once: a C++ compiler and cmake, ten minutes of a core.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median

from torch import Tensor

from .environments import installed, is_installed, run

PACKAGES = ("llama-cpp-python==0.3.36", "diskcache==5.6.3")
BUILD = {"CMAKE_ARGS": "-DLLAVA_BUILD=OFF -DGGML_NATIVE=ON"}


@dataclass(frozen=True)
class Decoded:
    """What it generated: tokens, and the tokens per second of each run."""

    tokens: list[int]
    speeds: list[float]

    @property
    def speed(self) -> float:
        """Median tokens per second."""
        return median(self.speeds)


def is_there() -> bool:
    """Whether llama.cpp is built for the benchmarks already."""
    return is_installed("llamacpp", PACKAGES)


def decode(file: Path, prompt: Tensor, threads: int, tokens: int = 64, runs: int = 5) -> Decoded:
    """Generate greedily after a prompt [n] of tokens with the model in a GGUF file. Raises NoPeer."""
    installed("llamacpp", PACKAGES, BUILD)
    settings = {"file": str(file), "threads": threads, "tokens": tokens, "runs": runs}
    _, found = run("llamacpp", PACKAGES, "decode_llamacpp.py", {"prompt": prompt}, settings)
    return Decoded(found["tokens"], found["tokens_per_second"])
