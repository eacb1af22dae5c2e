"""Check plait on the CUDA device of this machine: run the GPU tests, then time generated kernels against torch.

    python -m tests.gpu.gpu_check [--no-tests] [--output FILE]

Writes benchmarks/results/gpu.json: device, versions, and medians in microseconds of plait, eager torch and Inductor. Every
result is compared before it is timed. Exit code: 0 all well, 1 a test or a comparison failed, 2 no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from plait.codegen.cache import Cache
from plait.codegen.triton.matmul import LDC, TritonMatmul, configs, linear_epilogue, print_matmul
from plait.codegen.triton.printer import print_kernel
from plait.codegen.triton.quantized import FEW_ROWS, TritonQuantized, print_quantized, rows_of_program
from plait.codegen.triton.quantized import configs as quantized_configs
from plait.compiler.api import compile as plait_compile
from plait.compiler.source import Targets
from plait.formats import QuantizedType, quantize
from plait.runtime.artifact import load

from tests import cuda_models
from tests.codegen.kernels import BIAS_GELU, COLUMN_SUM, LAYER_NORM, SOFTMAX
from tests.gpu.kit import Launcher, bytes_kernel, target

ROOT = Path(__file__).parents[2]
ROUNDS = 5
Run = Callable[[], torch.Tensor]


def time_by_turns(runs: dict[str, Run]) -> dict[str, float]:
    """Median microseconds of each function, measured in alternating rounds with a cold level-2 cache."""
    from triton.testing import do_bench

    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            taken[name].append(do_bench(run, warmup=10, rep=40, return_mode="median") * 1e3)
    return {name: statistics.median(times) for name, times in taken.items()}


def compared(what: str, runs: dict[str, Run], rtol: float, atol: float) -> dict[str, Any]:
    """Times of `runs`, one of which is eager, after all results agreed with it."""
    results = {name: run().float() for name, run in runs.items()}
    for name, result in results.items():
        torch.testing.assert_close(result, results["eager"], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{what}, {n}: {m}")
    times = time_by_turns(runs)
    line = "  ".join(f"{name} {value:9.1f} us" for name, value in times.items())
    print(f"{what:32} {line}", file=sys.stderr)
    return {"what": what, "microseconds": {name: round(value, 2) for name, value in times.items()}}


def elementwise_and_reductions(cache: Cache) -> list[dict[str, Any]]:
    """The hand-built kernels at the sizes of a large model's activations."""
    m, n = 8192, 4096
    x, weight, bias = (torch.randn(*shape, device="cuda") for shape in ((m, n), (n,), (n,)))
    functions = (
        (BIAS_GELU, lambda: torch.nn.functional.gelu(x + bias, approximate="tanh")),
        (SOFTMAX, lambda: torch.softmax(x, -1)),
        (LAYER_NORM, lambda: torch.nn.functional.layer_norm(x, (n,), weight, bias)),
        (COLUMN_SUM, lambda: x.sum(0)),
    )
    done = []
    for case, eager in functions:
        (source,) = print_kernel(case.kernel)
        launcher = Launcher.of(source, cache)
        out = torch.empty_like(eager())

        def plait(launcher: Launcher = launcher, out: torch.Tensor = out) -> torch.Tensor:
            launcher({"x": x, "weight": weight, "bias": bias, "out": out}, {"M": m, "N": n})
            return out

        runs = {"plait": plait, "eager": eager, "inductor": torch.compile(eager)}
        done.append(compared(f"{case.name} {m}x{n} float32", runs, rtol=1e-3, atol=1e-2 if case is COLUMN_SUM else 1e-5))
    return done


def matmuls(cache: Cache) -> list[dict[str, Any]]:
    """Linear layers with bias and GELU's tanh part as epilogue; every config of the template is timed."""
    done = []
    for m, n, k in ((16, 4096, 4096), (512, 4096, 4096), (8192, 4096, 4096)):
        dtype = torch.bfloat16
        x = torch.randn(m, k, device="cuda").to(dtype)
        w, bias = (torch.randn(n, k, device="cuda") / math.sqrt(k)).to(dtype), torch.randn(n, device="cuda").to(dtype)
        out = torch.empty(m, n, device="cuda", dtype=dtype)
        epilogue, buffers = linear_epilogue("bfloat16", bias="bfloat16", activation="tanh")
        spec = TritonMatmul("linear_tanh", "bfloat16", epilogue, buffers, (LDC,), "k", "k")
        source = print_matmul(spec)
        sizes = {"M": m, "N": n, "K": k, "lda": k, "ldb": k, "ldc": n}

        def eager(x: torch.Tensor = x, w: torch.Tensor = w, bias: torch.Tensor = bias) -> torch.Tensor:
            return torch.tanh(torch.nn.functional.linear(x, w, bias))

        runs: dict[str, Run] = {"eager": eager, "inductor": torch.compile(eager)}
        for config in configs(spec):
            launcher = Launcher.of(source, cache, config)
            tiles = "x".join(str(size) for _, size in config.tiles[:3])

            def plait(launcher: Launcher = launcher, x=x, w=w, bias=bias, out=out, sizes=sizes) -> torch.Tensor:
                launcher({"A": x, "B": w, "bias": bias, "out": out}, sizes)
                return out

            runs[f"plait {tiles} {config.num_warps}w{config.num_stages}s"] = plait
        done.append(compared(f"linear+tanh {m}x{n}x{k} bfloat16", runs, rtol=2e-2, atol=2e-2))
    return done


def quantized(cache: Cache) -> list[dict[str, Any]]:
    """Products with quantized weights beside torch's of the same weight in bfloat16, from decoding to prefill. Few rows are
    given to both kernels; every config is timed."""
    done = []
    n = k = 4096
    epilogue, buffers = linear_epilogue("bfloat16")
    for bits, group in ((4, 128), (3, 128), (8, 128), (4, 32)):
        kind = QuantizedType((n, k), bits, group)
        weight = quantize(torch.randn(n, k) / math.sqrt(k), kind)
        assert weight.zeros is not None
        parts = {"codes": weight.codes.cuda(), "scales": weight.scales.cuda(), "zeros": weight.zeros.cuda()}
        w = weight.dequantize(torch.bfloat16).cuda()
        for m in (1, 2, 4, 8, 16, 64, 512, 4096):
            x = torch.randn(m, k, device="cuda").bfloat16()
            out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            runs: dict[str, Run] = {"eager": partial(torch.nn.functional.linear, x, w)}
            for rows in (0, rows_of_program(m)) if m <= FEW_ROWS else (0,):
                spec = TritonQuantized(f"quantized_{rows}", "bfloat16", kind, epilogue, buffers, (LDC,), rows)
                source = print_quantized(spec)
                for config in quantized_configs(spec):
                    launcher = Launcher.of(source, cache, config)
                    tiles = "x".join(str(size) for name, size in config.tiles if name != "GROUP")

                    def plait(launcher: Launcher = launcher, x=x, out=out, parts=parts, m=m) -> torch.Tensor:
                        launcher({"A": x, "out": out, **parts}, {"M": m, "lda": k, "ldc": n})
                        return out

                    runs[f"plait {'vector' if rows else 'tiled'} {tiles} {config.num_warps}w"] = plait
            done.append(compared(f"{kind} by {m} rows bfloat16", runs, rtol=2e-2, atol=2e-2))
    return done


def bytes_products(cache: Cache) -> list[dict[str, Any]]:
    """Products of bytes beside torch's in bfloat16 of the same numbers, and its own of bytes where it takes the rows."""
    done = []
    n = k = 4096
    spec = bytes_kernel()
    b = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda")
    for m in (1, 16, 64, 512, 4096):
        a = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
        out = torch.empty(m, n, device="cuda", dtype=torch.int32)
        runs: dict[str, Run] = {"eager": partial(torch.nn.functional.linear, a.bfloat16(), b.bfloat16())}
        if m > 16:
            runs["_int_mm"] = partial(torch._int_mm, a, b.t())
        for config in configs(spec):
            launcher = Launcher.of(print_matmul(spec), cache, config)
            tiles = "x".join(str(size) for _, size in config.tiles[:3])

            def plait(launcher: Launcher = launcher, a=a, out=out, m=m) -> torch.Tensor:
                launcher({"A": a, "B": b, "out": out}, {"M": m, "N": n, "K": k, "lda": k, "ldb": k, "ldc": n})
                return out

            runs[f"plait {tiles} {config.num_warps}w"] = plait
        # sums are of the order of 3e5, which bfloat16 rounds
        done.append(compared(f"bytes {m}x{n}x{k}", runs, rtol=2e-2, atol=4e3))
    return done


def models(cache: Cache) -> list[dict[str, Any]]:
    """Transformer blocks captured on the CPU, as artifacts loaded here."""
    done = []
    for width, heads, shape in ((256, 4, (1, 64)), (1024, 16, (8, 512))):
        torch.manual_seed(0)
        model, x = cuda_models.Block(width, heads).eval(), torch.randn(*shape, width)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "block.plait"
            capability = int(target().partition(":")[2])
            plait_compile(model, (x,)).save(path, targets=Targets(cuda=(capability,)))
            loaded = load(path, device="cuda")
        there, given = model.cuda().requires_grad_(False), x.cuda()
        compiled = torch.compile(there)
        runs: dict[str, Run] = {"plait": partial(loaded, given), "eager": partial(there, given)}
        runs["inductor"] = partial(compiled, given)
        done.append(compared(f"block {width} {shape[0]}x{shape[1]} float32", runs, rtol=1e-4, atol=1e-4))
    return done


def machine() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-tests", action="store_true", help="time only")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "gpu.json")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check needs a CUDA device, and this machine has none", file=sys.stderr)
        return 2
    tests = None if arguments.no_tests else int(pytest.main(["-m", "gpu", str(ROOT / "tests")]))
    report: dict[str, Any] = {"machine": machine(), "tests_exit_code": tests, "timings": []}
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(folder)
        try:
            for measure in (elementwise_and_reductions, matmuls, quantized, bytes_products, models):
                report["timings"] += measure(cache)
        finally:  # what was measured before a comparison failed is still worth reading
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if tests in (0, None) else 1


if __name__ == "__main__":
    sys.exit(main())
