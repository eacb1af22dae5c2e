"""What the command line compiles: SRC, `--shape`, `--dynamic` and `--target` as typed values."""

from __future__ import annotations

import importlib
import os
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..codegen.cpp.build import ISAS
from ..errors import BadShape, BadSource, BadTarget
from .export import argument_names


@dataclass(frozen=True)
class Source:
    """A model with the inputs to capture it on. `model` is a module or an exported program."""

    name: str
    model: torch.nn.Module | torch.export.ExportedProgram
    inputs: tuple[Any, ...]
    dynamic_shapes: Any = None
    names: tuple[str, ...] = field(default=())

    def eager(self) -> torch.nn.Module:
        """The model as a callable that runs without plait."""
        return self.model.module() if isinstance(self.model, torch.export.ExportedProgram) else self.model


def load(src: str, shapes: Sequence[str] = (), dynamic: Sequence[str] = (), *, seed: int = 0) -> Source:
    """The model that SRC names, with example inputs.

    Example inputs come from `shapes` (random, drawn with `seed`), else from the factory or the exported program.
    Raises BadSource, BadShape. Errors of the factory itself pass through.
    """
    if src.endswith(".pt2"):
        return _exported(src, shapes, dynamic)
    if src.endswith(".plait"):
        raise BadSource(src=src, why="it is compiled already")
    if ":" not in src:
        raise BadSource(src=src, why="it ends neither in .pt2 nor in .plait, and holds no colon")
    found = call_factory(src)
    parts = found if isinstance(found, tuple) else (found,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], torch.nn.Module):
        raise BadSource(src=src, why=f"the factory returned {_kind(found)}")
    model = parts[0].eval()
    names = argument_names(model)
    inputs = _as_tuple(parts[1]) if len(parts) > 1 else ()
    if shapes:
        inputs = random_inputs(parse_shapes(shapes), names, seed)
    elif len(parts) == 1:
        raise BadSource(src=src, why="the factory returned a module without example inputs, and there is no --shape")
    names = names[: len(inputs)]
    wanted = parts[2] if len(parts) == 3 else None
    return Source(src, model, inputs, parse_dynamic(dynamic, names, inputs) if dynamic else wanted, names)


def _exported(src: str, shapes: Sequence[str], dynamic: Sequence[str]) -> Source:
    if shapes or dynamic:
        option = "--shape" if shapes else "--dynamic"
        raise BadShape(
            option=option, value=(shapes or dynamic)[0], why="shapes of an exported program are fixed by torch.export"
        )
    if not Path(src).is_file():
        raise BadSource(src=src, why="there is no such file")
    if not zipfile.is_zipfile(src):
        raise BadSource(src=src, why="it is no zip file, as torch.export.save writes them")
    try:
        program = torch.export.load(src)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise BadSource(src=src, why=f"torch.export cannot load it: {error}") from error
    if program.example_inputs is None:
        raise BadSource(src=src, why="it was saved without example inputs")
    args, kwargs = program.example_inputs
    if kwargs:
        raise BadSource(src=src, why=f"it takes keyword arguments ({', '.join(kwargs)}); export it with positional ones")
    return Source(src, program, tuple(args), None, argument_names(program)[: len(args)])


def call_factory(src: str) -> Any:
    """What the function gives that SRC names as `pkg.mod:function`. Raises BadSource, and what the function raises."""
    where, _, name = src.partition(":")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", where) or not re.fullmatch(r"[A-Za-z_][\w.]*", name):
        raise BadSource(src=src, why="the part before the colon is a module, the part after it a function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does: the user's own module lies where the command is run
    try:
        found: Any = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not where.startswith(error.name):
            raise  # the module is there, but something that it imports is not
        raise BadSource(src=src, why=f"there is no module {where!r} (looked in {os.getcwd()} and sys.path)") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise BadSource(src=src, why=f"{where} has no {name!r}")
        found = getattr(found, part)
    if not callable(found):
        raise BadSource(src=src, why=f"{name} is {_kind(found)}, not a function")
    return found()


def _kind(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {', '.join(_kind(v) for v in value) or 'nothing'}"
    return f"a {type(value).__name__}"


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


# -- shapes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One `--shape`: the input's name, its sizes and dtype."""

    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype = torch.float32


def parse_shapes(texts: Sequence[str]) -> list[Shape]:
    """`name=1x3x224x224`, `tokens=2x16:int64`, several separated by commas. Raises BadShape."""
    found: list[Shape] = []
    for text in (part for t in texts for part in t.split(",")):
        match = re.fullmatch(r"(\w+)=((?:\d+x)*\d+|scalar)(?::(\w+))?", text.strip())
        if match is None:
            raise BadShape(option="--shape", value=text, why="it cannot be read")
        dtype = getattr(torch, match[3] or "float32", None)
        if not isinstance(dtype, torch.dtype):
            raise BadShape(option="--shape", value=text, why=f"torch has no dtype {match[3]!r}")
        sizes = () if match[2] == "scalar" else tuple(map(int, match[2].split("x")))
        found.append(Shape(match[1], sizes, dtype))
    return found


def random_inputs(shapes: Sequence[Shape], names: Sequence[str], seed: int) -> tuple[torch.Tensor, ...]:
    """One random tensor for each shape, in the order of the model's parameters `names`.

    Floats are normal; integers and bools are 0 or 1, which are valid as indices, masks and token ids alike.
    Raises BadShape for a name that the model does not have.
    """
    unknown = [s for s in shapes if s.name not in names]
    if unknown:
        raise BadShape(option="--shape", value=unknown[0].name, why=f"the model takes {', '.join(names) or 'nothing'}")
    generator = torch.Generator().manual_seed(seed)
    by_name = {s.name: s for s in shapes}
    return tuple(random_tensor(by_name[n].sizes, by_name[n].dtype, generator) for n in names if n in by_name)


def random_tensor(sizes: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A random CPU tensor, see `random_inputs`."""
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(tuple(sizes), generator=generator, dtype=torch.complex64 if dtype.is_complex else None).to(dtype)
    return torch.randint(0, 2, tuple(sizes), generator=generator).to(dtype)


def parse_dynamic(texts: Sequence[str], names: Sequence[str], inputs: Sequence[Any]) -> dict[str, Any]:
    """`name:0`, `name:0=2..512` or `name:0=batch:1..64`, several separated by commas, as `dynamic_shapes` of torch.export.

    Sizes with a name of their own (`batch`) are equal wherever the name occurs. Without one, torch finds out which sizes
    are equal, but takes them to be at least 2; a range from 0 or 1 gets a name from its input. Raises BadShape.
    """
    found: dict[str, Any] = {n: {} for n in names}
    named: dict[str, Any] = {}
    for text in (part.strip() for t in texts for part in t.split(",")):
        match = re.fullmatch(r"(\w+):(\d+)(?:=(?:([A-Za-z]\w*):?)?(?:(\d*)\.\.(\d*))?)?", text)
        if match is None or text.endswith(("=", ":")):
            raise BadShape(option="--dynamic", value=text, why="it cannot be read")
        name, dim, symbol = match[1], int(match[2]), match[3]
        if name not in found:
            raise BadShape(option="--dynamic", value=text, why=f"the model takes {', '.join(names) or 'nothing'}")
        tensor = inputs[list(names).index(name)]
        if not isinstance(tensor, torch.Tensor) or dim >= tensor.dim():
            rank = tensor.dim() if isinstance(tensor, torch.Tensor) else 0
            raise BadShape(option="--dynamic", value=text, why=f"input {name!r} has {rank} dimensions")
        low, high = (int(v) if v else None for v in (match[4], match[5]))
        if symbol is None and (low is None or low >= 2):
            found[name][dim] = torch.export.Dim.DYNAMIC(min=low, max=high)
            continue
        symbol = symbol or f"{name}_{dim}"
        if symbol not in named or low is not None or high is not None:
            named[symbol] = torch.export.Dim(symbol, min=low, max=high)
        found[name][dim] = symbol
    return {n: {d: named[v] if isinstance(v, str) else v for d, v in dims.items()} or None for n, dims in found.items()}


# -- targets ----------------------------------------------------------------------------------------------------------

CPU_ISAS = tuple(isa for isa in ISAS if isa.startswith("x86-64"))


@dataclass(frozen=True)
class Targets:
    """Machines to build binaries for: CPU instruction sets, and compute capabilities of CUDA devices (80, 90, …)."""

    isas: tuple[str, ...] = ()
    cuda: tuple[int, ...] = ()


def parse_targets(text: str) -> Targets:
    """`cpu`, `cpu:x86-64-v3`, `cuda:90`, separated by commas. Raises BadTarget."""
    isas: list[str] = []
    cuda: list[int] = []
    for target in (t.strip() for t in text.split(",")):
        kind, _, which = target.partition(":")
        if kind == "cpu" and (not which or which in CPU_ISAS):
            isas += [which] if which else CPU_ISAS
        elif kind == "cuda" and re.fullmatch(r"(sm_?)?\d{2,3}", which):
            cuda.append(int(which.removeprefix("sm").removeprefix("_")))
        else:
            why = "a CUDA target needs a compute capability" if kind == "cuda" else "it is not known"
            raise BadTarget(target=target, why=why, isas=", ".join(CPU_ISAS))
    return Targets(tuple(dict.fromkeys(isas)), tuple(dict.fromkeys(cuda)))


def describe_inputs(inputs: Sequence[Any], names: Sequence[str]) -> Mapping[str, str]:
    """Inputs in words, by name: `f32[2,16]`-like text for tensors, the value's kind for the rest."""
    texts = [f"{str(x.dtype)[6:]}{list(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__ for x in inputs]
    return dict(zip(names, texts, strict=False))
