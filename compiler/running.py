"""Running an artifact from the command line: inputs from files or at random, results in words, comparison with eager.

Imports the runtime only; the compiler stays out unless a comparison needs it.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import BadInputs
from ..runtime import weights
from ..runtime.archive import Archive
from ..runtime.artifact import LoadedModel, load_weights, state_names
from ..runtime.plan import InputSpec, Plan
from ..runtime.sizes import evaluate
from ..runtime.state import private

CPU = torch.device("cpu")
DEFAULT_SIZE = 8
"""What a size symbol is in random inputs, where its range allows."""


def random_inputs(plan: Plan, seed: int = 0, given: Mapping[str, int] | None = None) -> list[Any]:
    """Flat inputs for a plan: floats are normal, integers and bools 0 or 1, laid out as the plan expects.

    Size symbols are DEFAULT_SIZE, moved into their range, or as `given`.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {s.name: min(max(s.low, DEFAULT_SIZE), s.high if s.high is not None else DEFAULT_SIZE) for s in plan.symbols}
    sizes.update(given or {})
    return [_random(spec, sizes, generator) for spec in plan.inputs]


def _random(spec: InputSpec, sizes: Mapping[str, int], generator: torch.Generator) -> Any:
    if spec.kind != "tensor":
        if spec.expr is None or isinstance(spec.expr, float) or spec.kind == "bool":
            return spec.expr
        return evaluate(spec.expr, sizes)
    shape = [evaluate(n, sizes) for n in spec.shape]
    dtype = getattr(torch, str(spec.dtype))
    if dtype.is_floating_point or dtype.is_complex:
        values = torch.randn(shape, generator=generator, dtype=torch.complex64 if dtype.is_complex else torch.float32)
    else:
        values = torch.randint(0, 2, shape, generator=generator)
    strides = [evaluate(n, sizes) for n in spec.strides] if spec.strides is not None else values.stride()
    return torch.empty_strided(shape, strides, dtype=dtype, device=spec.device).copy_(values)


def read_inputs(files: Sequence[str], plan: Plan) -> list[Any]:
    """Flat inputs from one .npy for each, in order, or from one .safetensors by name. Raises BadInputs."""
    names = [spec.name for spec in plan.inputs]

    def bad(path: object, why: str) -> BadInputs:
        return BadInputs(path=path, why=why, names=", ".join(names))

    if len(files) == 1 and files[0].endswith(".safetensors"):
        tensors = _load_safetensors(files[0], bad)
        if missing := [n for n in names if n not in tensors]:
            raise bad(files[0], f"it has no tensor {missing[0]!r}, only {', '.join(tensors)}")
        found: list[Any] = [tensors[n] for n in names]
    else:
        if len(files) != len(names):
            raise bad(
                files[-1] if files else "nothing", f"the model takes {len(names)} inputs, {len(files)} files were given"
            )
        found = [_load_npy(path, bad) for path in files]
    specs = zip(plan.inputs, found, strict=True)
    return [x.to(spec.device) if spec.kind == "tensor" else _as_number(x) for spec, x in specs]


def _load_safetensors(path: str, bad: Any) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise bad(path, str(error)) from error


def _load_npy(path: str, bad: Any) -> torch.Tensor:
    import numpy as np

    try:
        return torch.from_numpy(np.load(path, allow_pickle=False))
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise bad(path, str(error)) from error


def _as_number(x: torch.Tensor) -> Any:
    return x.item()


def write_results(results: Sequence[Any], path: str | Path) -> None:
    """Tensors among flat results as `output0`, `output1`, … of a .safetensors file."""
    from safetensors.torch import save_file

    save_file({f"output{i}": x.contiguous() for i, x in enumerate(results) if isinstance(x, torch.Tensor)}, path)


def describe(result: Any) -> dict[str, Any]:
    """A result in a few numbers: dtype and shape, least, mean and largest value, the first elements."""
    if not isinstance(result, torch.Tensor):
        return {"kind": type(result).__name__, "value": result}
    found: dict[str, Any] = {"kind": f"{str(result.dtype)[6:]}{list(result.shape)}"}
    if result.numel() and not result.is_complex():
        wide = result.double()
        found |= {"min": wide.min().item(), "mean": wide.mean().item(), "max": wide.max().item()}
    return found | {"first": result.flatten()[:6].tolist()}


# -- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One result against its reference: the largest difference, the norm of the difference relative to that of the
    reference, the tolerances, and whether they hold for every element."""

    output: int
    equal: bool
    max_abs: float
    relative: float
    rtol: float
    atol: float
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain data; JSON has no infinities, so they become text."""
        return {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in asdict(self).items()}


def call_reference(model: Any, loaded: LoadedModel, flat: Sequence[Any]) -> list[Any]:
    """Results of an eager model on an artifact's flat inputs, flattened. Inputs are copied, so that writes do not show."""
    tree = pytree.treespec_loads(json.dumps(loaded.manifest["structure"]["inputs"]))
    args, kwargs = pytree.tree_unflatten(_as_captured(loaded, flat), tree)
    with torch.no_grad():
        return pytree.tree_leaves(model(*args, **kwargs))


def call_graph(path: str | Path, loaded: LoadedModel, flat: Sequence[Any]) -> list[Any]:
    """Results of an artifact's graph after the passes, run op by op by torch where the model was captured, on flat inputs
    and the buffers as they were saved.

    Imports the IR.
    """
    from ..ir import parse_graph
    from .inspection import plan_of

    archive = Archive(path)
    constants = weights.originals(load_weights(archive, plan_of(archive)))
    graph = parse_graph(loaded.graphs["tensor"], constants)
    state = [private(constants[name]) for name in dict.fromkeys(state_names(loaded.manifest, constants).values())]
    with torch.no_grad():
        return list(graph.run(*state, *_as_captured(loaded, flat)))


def _as_captured(loaded: LoadedModel, flat: Sequence[Any]) -> list[Any]:
    """Copies of flat inputs on the device that the model was captured on."""
    devices = [described.get("device", "cpu") for described in loaded.manifest["inputs"]]
    return [x.to(d, copy=True) if isinstance(x, torch.Tensor) else x for x, d in zip(flat, devices, strict=True)]


def median_seconds(call: Callable[[], Any], repeat: int, device: torch.device = CPU) -> float:
    """Median seconds of `repeat` calls after one to warm up; on a CUDA device until their work is done."""

    def done() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    call()
    times: list[float] = []
    for _ in range(repeat):
        start = done()
        call()
        times.append(done() - start)
    return statistics.median(times)


def compare(
    got: Sequence[Any], expected: Sequence[Any], *, rtol: float | None = None, atol: float | None = None
) -> list[Comparison]:
    """Each result against its reference. Tolerances default to those of torch.testing for the dtype."""
    if len(got) != len(expected):
        note = f"{len(got)} results against {len(expected)}"
        return [Comparison(0, False, math.inf, math.inf, rtol or 0.0, atol or 0.0, note)]
    return [_compare(i, a, b, rtol, atol) for i, (a, b) in enumerate(zip(got, expected, strict=True))]


def _compare(i: int, got: Any, expected: Any, rtol: float | None, atol: float | None) -> Comparison:
    if not isinstance(got, torch.Tensor) or not isinstance(expected, torch.Tensor):
        same = type(got) is type(expected) and bool(got == expected)
        return Comparison(i, same, 0.0 if same else math.inf, 0.0, 0.0, 0.0, "" if same else f"{got!r} against {expected!r}")
    if got.dtype != expected.dtype or got.shape != expected.shape:
        note = f"{str(got.dtype)[6:]}{list(got.shape)} against {str(expected.dtype)[6:]}{list(expected.shape)}"
        return Comparison(i, False, math.inf, math.inf, 0.0, 0.0, note)
    default_rtol, default_atol = torch.testing._comparison.default_tolerances(expected)
    rtol, atol = default_rtol if rtol is None else rtol, default_atol if atol is None else atol
    got = got.to(expected.device)
    close = torch.isclose(got, expected, rtol=rtol, atol=atol, equal_nan=True)
    wide = torch.complex128 if got.is_complex() else torch.float64
    a, b = got.to(wide), expected.to(wide)
    gap = torch.where(a == b, 0.0, (a - b).abs())
    gap = torch.where(a.isnan() & b.isnan(), 0.0, gap)
    if not gap.numel():
        return Comparison(i, True, 0.0, 0.0, rtol, atol)
    scale = b.abs().nan_to_num(0.0, 0.0, 0.0).norm().clamp_min(torch.finfo(torch.float64).tiny)
    return Comparison(i, bool(close.all()), gap.max().item(), (gap.norm() / scale).item(), rtol, atol)
