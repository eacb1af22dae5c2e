"""Tensors and passes in a bundle: stored, or described so that others of their kind can be made in their place."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_type_hints

import torch

from ...errors import CannotBundle, DamagedBundle, DeviceNotAvailable, PassNotFound
from ...ir import Graph
from ...ir.types import dtype_from_text, dtype_text
from ...passes import registry
from ...passes.base import PASSES, Pass
from .interpret import WIDE, laid_out

_NO_JSON = (math.inf, -math.inf)


def described(x: Any, seed: int, *, stored: bool) -> dict[str, Any]:
    """What JSON says of an input or a constant. A tensor that is not stored is drawn with `seed` when it is needed, of the
    same mean, deviation and range. Raises CannotBundle for what is neither tensor nor number."""
    if x is None or isinstance(x, bool | int):
        return {"kind": "number", "value": x}
    if isinstance(x, float):
        return {"kind": "float", "value": x.hex()}  # JSON knows neither infinities nor NaN
    if not isinstance(x, torch.Tensor) or x.layout is not torch.strided:
        raise CannotBundle(what=f"an input of class {type(x).__name__}", why="only dense tensors and numbers can be")
    found: dict[str, Any] = {
        "kind": "tensor", "dtype": dtype_text(x.dtype), "shape": list(x.shape), "strides": list(x.stride()),
        "device": str(x.device), "stored": stored,
    }  # fmt: skip
    return found if stored else {**found, "seed": seed, **_statistics(x.detach())}


def _statistics(x: torch.Tensor) -> dict[str, Any]:
    wide = (torch.view_as_real(x) if x.is_complex() else x).to(torch.float64)
    wide = wide[wide.isfinite()]
    if not wide.numel():
        return {"mean": 0.0, "std": 0.0, "low": 0.0, "high": 0.0}
    spread = float(wide.std(correction=0))
    return {"mean": float(wide.mean()), "std": spread, "low": float(wide.min()), "high": float(wide.max())}


def restored(spec: Any, tensor: torch.Tensor | None, part: str) -> Any:
    """The input or constant that `described` describes; `tensor` is what was stored of it. Raises DamagedBundle."""
    try:
        if spec["kind"] == "number" and (spec["value"] is None or isinstance(spec["value"], int)):
            return spec["value"]
        if spec["kind"] == "float":
            return float.fromhex(spec["value"])
        dtype, shape, strides = dtype_from_text(spec["dtype"]), _sizes(spec["shape"]), _sizes(spec["strides"])
        if spec["stored"] != (tensor is not None):
            raise ValueError("its tensor is missing" if tensor is None else "there is a tensor that it does not store")
        if tensor is None:
            tensor = _drawn(shape, dtype, spec)
        elif dtype.is_complex:
            tensor = torch.view_as_complex(tensor)
        if (tensor.dtype, list(tensor.shape)) != (dtype, shape) or len(strides) != len(shape):
            raise ValueError(f"its tensor is {tensor.dtype} {list(tensor.shape)}")
        return _moved(laid_out(tensor, strides), str(spec["device"]))
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise DamagedBundle(part=part, why=str(error)) from error


def _moved(tensor: torch.Tensor, device: str) -> torch.Tensor:
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise DeviceNotAvailable(device=device, why="the bundle was written where there is a CUDA device, here is none")
    return tensor.to(device)


def _sizes(found: Any) -> list[int]:
    if not isinstance(found, list) or not all(type(n) is int and n >= 0 for n in found):
        raise ValueError(f"{found!r} are no sizes")
    return found


def _drawn(shape: list[int], dtype: torch.dtype, spec: Mapping[str, Any]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(spec["seed"])
    if not (dtype.is_floating_point or dtype.is_complex):
        if dtype == torch.bool:
            return torch.rand(shape, generator=generator) < spec["mean"]
        return torch.randint(int(spec["low"]), int(spec["high"]) + 1, shape, generator=generator).to(dtype)
    wide = torch.randn(shape, generator=generator, dtype=WIDE.get(dtype, dtype)) * spec["std"]
    if dtype.is_complex:
        return (wide * 2**0.5 + spec["mean"]).to(dtype)
    return (wide + spec["mean"]).clamp(spec["low"], spec["high"]).to(dtype)


def stored(tensors: Mapping[str, torch.Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file."""
    import safetensors.torch

    plain = {name: t.detach().cpu() for name, t in tensors.items()}
    real = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in plain.items()}
    return safetensors.torch.save({name: t.contiguous().clone() for name, t in real.items()})


def all_constants(graph: Graph) -> dict[str, torch.Tensor]:
    """Constants of a graph and of the regions in it."""
    found = dict(graph.constants)
    for node in graph.nodes:
        for region in node.regions:
            found.update(all_constants(region))
    return found


# -- passes -------------------------------------------------------------------------------------------------------------


def pass_data(one: Pass) -> dict[str, Any]:
    """A pass as JSON: its name where it is plait's, else where its class is imported from; and its options. Raises
    CannotBundle for an option that is no plain value."""
    cls = type(one)
    for name, value in one.options().items():
        if not all(v is None or (isinstance(v, str | int | float) and v not in _NO_JSON) for v in _leaves(value)):
            raise CannotBundle(what=f"option {name} of pass {one.name}", why=f"{value!r} is no plain value")
    own = PASSES.get(one.name) is cls and cls.__module__.startswith(f"{registry.__package__}.")
    where = {} if own else {"import": f"{cls.__module__}:{cls.__qualname__}"}
    return {"name": one.name, **where, "options": one.options()}


def importable(one: Pass) -> bool:
    """Whether another process can import the class of a pass: it lies in a module, not in a script or a function."""
    cls = type(one)
    return cls.__module__ != "__main__" and "<locals>" not in cls.__qualname__


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for v in value:
            yield from _leaves(v)
    else:
        yield value


def pass_from(data: Any) -> Pass:
    """Inverse of `pass_data`. Raises PassNotFound, DamagedBundle, and what `registry.make` raises."""
    if not isinstance(data, dict) or not isinstance(data.get("options"), dict) or not isinstance(data.get("name"), str):
        raise DamagedBundle(part="bundle.json", why="its list of passes is ill-formed")
    if "import" not in data:
        return registry.make(data["name"], **data["options"])
    if not isinstance(data["import"], str) or registry.PLACE.fullmatch(data["import"]) is None:
        raise DamagedBundle(part="bundle.json", why=f"{data['import']!r} is no place of a pass")
    cls = registry.imported(data["import"])
    hints = get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = data["options"].keys() - known
    if unknown:
        raise PassNotFound(path=data["import"], why=f"it has no option {min(unknown)!r} any more")
    return cls(**{k: registry.convert(v, hints[k]) for k, v in data["options"].items()})


def running(passes: Sequence[Pass], level: str) -> list[Pass]:
    """Those passes that can still run on a graph of that level."""
    places = {"forward": ("forward", "split", "any"), "joint": ("joint", "split", "any"), "split": ("split", "any")}
    return [p for p in passes if p.at in places[level]]
