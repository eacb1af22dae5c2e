"""GFLOP/s of the matmul template beside oneDNN and MKL, alternating in one process on the same operands.

    python -m plait.codegen.templates.matmul_bench [--threads 2] [--layout k] [--dtype int8] [--seconds 0.2] [BxMxNxK ...]

Each line checks first that all agree. Turns that other work disturbed are discarded (see `cost/profile.py`); a `~` marks
figures for which too few were left.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch

from ...cost.profile import Timing, measure_alternating
from .matmul_choice import MatmulProblem, matmul_candidates

SHAPES = ("1x64x1536x384", "1x64x384x1536", "1x512x1536x384", "1x512x384x1536", "1x512x3072x768", "1x512x768x3072",
          "1x1024x1024x1024", "48x64x64x64", "8x512x512x64", "1x1x1536x384", "1x4x1536x384", "1x8x1536x384",
          "1x1x4096x4096")  # fmt: skip


def measure(problem: MatmulProblem, threads: int, seconds: float, folder: Path) -> dict[str, Timing]:
    """Timings of all implementations. Raises AssertionError if two of them disagree by more than rounding."""
    calls = matmul_candidates(problem, threads, folder)
    results = {name: call().clone().view(problem.batch, problem.m, problem.n) for name, call in calls.items()}
    first = next(iter(results.values()))
    exact = not first.dtype.is_floating_point
    step = 0.0 if exact else max(torch.finfo(first.dtype).eps, 1e-6)  # of sums of k products of normal numbers
    for result in results.values():
        torch.testing.assert_close(result, first, rtol=10 * step, atol=step * math.sqrt(problem.k) * 4)
    return measure_alternating(calls, threads, seconds)


def main() -> None:
    """Command line, see the module."""
    parser = argparse.ArgumentParser(description="GFLOP/s of the matmul template beside the libraries")
    parser.add_argument("shapes", nargs="*", default=SHAPES, metavar="BxMxNxK")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--layout", choices=("k", "n"), default="k", help="contiguous axis of B: k is linear's weight")
    parser.add_argument("--dtype", choices=("float32", "float64", "bfloat16", "float16", "int8"), default="float32")
    parser.add_argument("--seconds", type=float, default=0.2, help="per shape")
    args = parser.parse_args()
    print(f"{'batch x m x n x k':>20}  GFLOP/s (median), {args.threads} threads, {args.dtype}")
    with tempfile.TemporaryDirectory() as folder:
        for text in args.shapes:
            batch, m, n, k = map(int, text.split("x"))
            problem = MatmulProblem(m, n, k, batch, args.dtype, b=args.layout, owned=True)
            timings = measure(problem, args.threads, args.seconds, Path(folder))
            flops = 2e-9 * batch * m * n * k
            cells = (f"{name} {flops / t.median:6.1f}{'~' if t.contended else ' '}" for name, t in timings.items())
            print(f"{text:>20}  {'  '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
