"""Weights in the safetensors format, written and read without the safetensors package.

Tensors whose size is a multiple of 64 bytes come first, so that each of them starts at a multiple of 64 bytes of the
file; the format allows no gaps. The header is padded likewise. Any reader of the format reads these files.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..errors import DamagedArtifact
from .panels import Panels
from .plan import Plan, ValueSpec
from .reordered import Reordered

ALIGNMENT = 64
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def serialise(tensors: Mapping[str, torch.Tensor]) -> list[Any]:
    """The file as a list of buffers; the tensors' bytes are not copied where they are contiguous and on the CPU.

    Raises ValueError for a dtype that the format does not have.
    """
    for name, t in tensors.items():
        if t.dtype not in _NAMES:
            raise ValueError(f"weight {name!r} has dtype {t.dtype}, which safetensors files cannot hold")
    ordered = sorted(tensors.items(), key=lambda item: (item[1].nbytes % ALIGNMENT != 0, -item[1].itemsize, item[0]))
    header, end = {}, 0
    for name, t in ordered:
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [end, end + t.nbytes]}
        end += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return [len(text).to_bytes(8, "little") + text, *(_bytes(t) for _, t in ordered)]


def _bytes(t: torch.Tensor) -> memoryview:
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read(buffer: mmap.mmap, start: int, end: int, part: str) -> dict[str, torch.Tensor]:
    """The tensors of the file that lies in `buffer[start:end]`, over the buffer's memory.

    Raises DamagedArtifact, naming `part`, for anything that is not a well-formed file.
    """
    data = start + 8 + int.from_bytes(buffer[start : start + 8], "little")
    try:
        header = json.loads(buffer[start + 8 : data]) if data <= end else None
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise DamagedArtifact(part=part, why="its header is not that of a safetensors file")
    header.pop("__metadata__", None)
    return {name: _tensor(buffer, data, end, name, entry, part) for name, entry in header.items()}


def _tensor(buffer: mmap.mmap, data: int, end: int, name: str, entry: Any, part: str) -> torch.Tensor:
    wrong = DamagedArtifact(part=part, why=f"the entry of tensor {name!r} is wrong")
    try:
        dtype, shape, (first, last) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
        right = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        right = right and last - first == math.prod(shape) * dtype.itemsize and data + last <= end
    except (KeyError, TypeError, ValueError):
        raise wrong from None
    if not right or (data + first) % dtype.itemsize:
        raise wrong
    if last == first:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(buffer, dtype=dtype, count=(last - first) // dtype.itemsize, offset=data + first)
    return flat.view(shape)


def constants(plan: Plan) -> Iterator[ValueSpec]:
    """The values of a plan and its regions that are constants."""
    yield from (v for v in plan.values if v.storage == "constant")
    for _, region in plan.regions:
        yield from constants(region)


def placed(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Constants where and as a plan has them: those of device values on their device, at multiples of 16 bytes; panels of
    weights made where there are none, weights of convolutions laid out for this processor."""
    found = dict(tensors)
    made: dict[int, torch.Tensor] = {}
    for v in constants(plan):
        panels = Panels.named(str(v.ref))
        if panels is not None and str(v.ref) not in found:
            found[str(v.ref)] = panels.pack(tensors[panels.weight])
        reordered = Reordered.named(str(v.ref))
        if reordered is not None:
            found[str(v.ref)] = reordered.lay_out(tensors[reordered.weight])
        if v.device != "cpu":
            t = tensors[str(v.ref)]
            if id(t) not in made:
                made[id(t)] = _on_device(t.detach(), v.device)
            found[str(v.ref)] = made[id(t)]
    return found


def stored(plan: Plan, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Constants as a file holds them: weights that the plan reads in panels only, so."""
    names = {str(v.ref) for v in constants(plan)}
    panels = [p for p in map(Panels.named, sorted(names)) if p is not None]
    gone = {p.weight for p in panels} - names
    return {**{n: t for n, t in tensors.items() if n not in gone}, **{p.name: p.pack(tensors[p.weight]) for p in panels}}


def source(name: str) -> str:
    """The constant of a file that a plan's constant is, or is made from."""
    reordered = Reordered.named(name)
    return name if reordered is None else reordered.weight


def originals(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights as the model has them: those that are there in panels only, unpacked."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if (panels := Panels.named(name)) is not None and panels.weight not in found:
            found[panels.weight] = panels.unpack(tensor)
    return found


def _on_device(t: torch.Tensor, device: str) -> torch.Tensor:
    if str(t.device) == device and t.data_ptr() % 16 == 0:
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).copy_(t)
