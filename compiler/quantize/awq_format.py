"""AWQ checkpoints as AutoAWQ and transformers write them: 4 bits with zero points, version "gemm".

A linear layer x [.., K] -> [.., N] with groups of G columns is stored as `qweight` int32 [K, N / 8], `qzeros` int32
[K / G, N / 8], `scales` float16 [K / G, N] and, where it has one, `bias` [N]. Bits 4 i to 4 i + 3 of word j hold row
8 j + ORDER[i] of the weight. Its elements are (code - zero) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CannotWriteCheckpoint, DamagedCheckpoint, UnsupportedCheckpoint
from ...formats import QuantizedType
from ...formats.quantized import best_layout
from .checkpoints import (
    CONFIG,
    SCALE_OF,
    SHARD_BYTES,
    Checkpoint,
    QuantizedWeight,
    Stored,
    merged,
    plain_layers,
    read_config,
    read_tensors,
    unpacked,
    write_folder,
)

METHOD = "awq"
BITS, WORD = 4, 8  # bits of a code; codes of a word
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SUFFIXES = (".qweight", ".qzeros", ".scales", ".bias")


def read(folder: str | Path) -> Checkpoint:
    """A checkpoint from a folder. Raises DamagedCheckpoint, UnsupportedCheckpoint."""
    path = Path(folder)
    config, quantization = read_config(path)
    group, symmetric = _settings(path / CONFIG, quantization)
    stored = read_tensors(path)
    names = [n.removesuffix(s) for n in stored.tensors for s in (".qweight", ".qzeros") if n.endswith(s)]
    quantized = {name: _read_layer(stored, name, group, symmetric) for name in dict.fromkeys(names)}
    taken = {name + suffix for name in quantized for suffix in SUFFIXES}
    return Checkpoint(quantized, {n: t for n, t in stored.tensors.items() if n not in taken}, config)


def _settings(file: Path, quantization: Mapping[str, Any]) -> tuple[int, bool]:
    """(group size, -1 for one group a row; whether there are no zero points) that a config asks for."""

    def refuse(why: str, way: str) -> None:
        raise UnsupportedCheckpoint(file=file, why=why, way=way)

    method, version = quantization.get("quant_method"), str(quantization.get("version", "gemm")).lower()
    if method != METHOD:
        refuse(f"its quant_method is {method!r}, not {METHOD!r}", "take read_checkpoint, which goes by the method")
    if version != "gemm":
        refuse(f"its version is {version!r}", "quantize it with version 'GEMM', whose layout the others are made from")
    if quantization.get("bits") != BITS:
        refuse(f"it has {quantization.get('bits')!r} bits", f"take a checkpoint with {BITS} bits; AWQ files hold no others")
    group, zero_point = quantization.get("group_size"), quantization.get("zero_point", True)
    if type(group) is not int or (group < 1 and group != -1):
        refuse(f"its group_size is {group!r}", "give a positive number of columns, or -1 for one group a row")
    if type(zero_point) is not bool:
        refuse(f"its zero_point is {zero_point!r}", "give true or false")
    return int(group or 0), not zero_point


def _read_layer(stored: Stored, name: str, group: int, symmetric: bool) -> QuantizedWeight:
    qweight, qzeros, scales = (name + suffix for suffix in SUFFIXES[:3])
    words = stored.take(qweight, [torch.int32], (-1, -1), qzeros)
    columns, rows = words.shape[0], words.shape[1] * WORD
    if not words.numel():
        raise DamagedCheckpoint(file=stored.files[qweight], why=f"{qweight} is empty: {list(words.shape)}")
    group = columns if group == -1 else group
    if columns % group:
        raise UnsupportedCheckpoint(
            file=stored.files[qweight],
            why=f"groups of {group} do not divide the {columns} columns of {qweight}",
            way=f"correct group_size in {CONFIG}, or quantize again with a group size that divides",
        )
    groups = columns // group
    floats = [torch.float16, torch.bfloat16, torch.float32]
    factors = stored.take_scales(scales, floats, (groups, rows), qweight)
    symmetric = symmetric and qzeros not in stored.tensors
    kind = QuantizedType((rows, columns), BITS, group, symmetric, SCALE_OF[factors.dtype], best_layout(columns, group))
    points = None
    if not symmetric:
        points = unpack(stored.take(qzeros, [torch.int32], (groups, rows // WORD), qweight)).t()
    parts = kind.pack(unpack(words).t(), factors.t(), points)
    return QuantizedWeight(parts, stored.take_bias(name + ".bias", rows, qweight))


def write(folder: str | Path, checkpoint: Checkpoint, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint to a folder, in shards of at most so many bytes.

    A symmetric weight is written with zero points of 8. All of `checkpoint.config` but its `quantization_config` is kept;
    layers that are not quantized are added to `modules_to_not_convert`. Raises CannotWriteCheckpoint: the format holds 4
    bits, float16 scales, rows that are a multiple of 8, one group size for all layers, and activations in float.
    """
    group = _common_group(checkpoint)
    tensors = [_written_layer(name, weight) for name, weight in checkpoint.quantized.items()]
    quantization = {
        "quant_method": METHOD,
        "bits": BITS,
        "group_size": group,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": _left_alone(checkpoint),
    }
    config = {**checkpoint.config, "quantization_config": quantization}
    write_folder("AWQ", folder, merged("AWQ", *tensors, checkpoint.plain), config, shard_bytes)


def _common_group(checkpoint: Checkpoint) -> int:
    """The group size of all layers, -1 where each row is one group in layers of several sizes."""
    sizes = {weight.parts.type.group for weight in checkpoint.quantized.values()}
    if len(sizes) > 1 and all(w.parts.type.groups == 1 for w in checkpoint.quantized.values()):
        return -1
    if len(sizes) != 1:
        found = ", ".join(map(str, sorted(sizes))) or "none"
        _refuse(f"all layers have one group size in this format, and these have {found}", "write compressed-tensors instead")
    return sizes.pop()


def _written_layer(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    kind = weight.parts.type
    if kind.bits != BITS:
        _refuse(f"{name} has {kind.bits} bits", f"write compressed-tensors, or quantize to {BITS} bits")
    if kind.scale != "f16":
        _refuse(f"{name} has scales of {kind.scale}", "quantize with scales of float16, or write compressed-tensors")
    if len(kind.shape) != 2 or kind.rows % WORD:
        _refuse(f"{name} is {list(kind.shape)}, and its rows are no multiple of {WORD}", "leave this layer in float")
    codes, scales, zeros = unpacked("AWQ", name, weight)
    made = {".qweight": pack(codes.t()), ".qzeros": pack(zeros.t()), ".scales": scales.t()}
    return {name + s: t for s, t in made.items()} | ({} if weight.bias is None else {name + ".bias": weight.bias})


def _left_alone(checkpoint: Checkpoint) -> list[str]:
    before = checkpoint.config.get("quantization_config") or {}
    listed = list(before.get("modules_to_not_convert") or []) if before.get("quant_method") == METHOD else []
    return [*listed, *(n for n in plain_layers(checkpoint) if not any(n.endswith(known) for known in listed))]


def _refuse(why: str, way: str) -> None:
    raise CannotWriteCheckpoint(format="AWQ", why=why, way=way)


def pack(codes: Tensor) -> Tensor:
    """Codes [A, N] from 0 to 15 as int32 [A, N / 8], in the order of this format."""
    places = torch.tensor(ORDER, device=codes.device).argsort().to(torch.int32)  # where in a word each row lies
    return (codes.to(torch.int32).unflatten(-1, (-1, WORD)) << places * BITS).sum(-1, dtype=torch.int32)


def unpack(words: Tensor) -> Tensor:
    """Inverse of `pack`: int32 [A, N]."""
    places = torch.tensor(ORDER, device=words.device).argsort().to(torch.int32)
    return (words[..., None] >> places * BITS & 15).flatten(-2)
