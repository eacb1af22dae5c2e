"""Checkpoints of compressed-tensors: "pack-quantized" (4 and 8 bits) and "int-quantized" (weights and inputs of 8 bits).

pack-quantized: `weight_packed` int32 [N, ceil(K * bits / 32)], codes of a row one after the other, lowest bits first;
`weight_scale` [N, G] (G = 1 for the strategy "channel"); `weight_zero_point` int32 [ceil(N * bits / 32), G], packed along N,
where it is asymmetric; `weight_shape` [N, K].
int-quantized: `weight` int8 [N, K], `weight_scale` [N, G], symmetric; inputs are rounded to int8 for each token where the
config says so.

Codes and zero points count from -2^(bits - 1) there and are packed counting from 0, as they are here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
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
from .modules import Activations

METHOD = "compressed-tensors"
PACKED, INT = "pack-quantized", "int-quantized"
BITS = (4, 8)
PARTS = (".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape")
UNREAD = tuple(
    "." + name
    for name in (
        "weight_g_idx",
        "weight_global_scale",
        "input_scale",
        "input_zero_point",
        "input_global_scale",
        "output_scale",
    )
)
"""Tensors that change what a layer computes, in ways that are not read here."""
_FLOATS = [torch.float16, torch.bfloat16, torch.float32]


@dataclass(frozen=True)
class Scheme:
    """How the layers of a config group are quantized; `group` None is one group a row."""

    format: str
    bits: int
    symmetric: bool
    group: int | None
    activations: Activations


# -- reading ------------------------------------------------------------------------------------------------------------


def read(folder: str | Path) -> Checkpoint:
    """A checkpoint from a folder. Raises DamagedCheckpoint, UnsupportedCheckpoint."""
    path = Path(folder)
    config, quantization = read_config(path)
    groups = _groups(path / CONFIG, quantization)
    stored = read_tensors(path)
    for name in stored.tensors:
        if name.endswith(UNREAD):
            _unsupported(stored.files[name], f"{name} is no part of the formats {PACKED} and {INT} that is read")
    layers = dict.fromkeys(n.removesuffix(s) for n in stored.tensors for s in PARTS if n.endswith(s))
    bytes_ = (n for n, t in stored.tensors.items() if n.endswith(".weight") and t.dtype == torch.int8)
    layers.update(dict.fromkeys(n.removesuffix(".weight") for n in bytes_))
    quantized: dict[str, QuantizedWeight] = {}
    taken: set[str] = set()
    for name in layers:
        scheme = _scheme_of(path / CONFIG, groups, name)
        _check_symmetric(stored, name + ".weight_zero_point", scheme)
        quantized[name] = _read_packed(stored, name, scheme) if scheme.format == PACKED else _read_int(stored, name, scheme)
        taken |= {name + s for s in (*PARTS, ".bias")} | ({name + ".weight"} if scheme.format == INT else set())
    return Checkpoint(quantized, {n: t for n, t in stored.tensors.items() if n not in taken}, config)


def _unsupported(file: str | Path, why: str, way: str = "") -> None:
    raise UnsupportedCheckpoint(
        file=file,
        why=why,
        way=way or f"quantize it to {PACKED} of 4 or 8 bits, or to {INT} with dynamic activations for each token",
    )


def _groups(file: Path, quantization: Mapping[str, Any]) -> list[tuple[list[str], Scheme]]:
    """(targets, scheme) of each config group."""
    method = quantization.get("quant_method")
    if method != METHOD:
        _unsupported(
            file, f"its quant_method is {method!r}, not {METHOD!r}", "take read_checkpoint, which goes by the method"
        )
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if quantization.get(key) and quantization[key] != {"format": "dense"}:
            _unsupported(file, f"its {key} changes what the model computes, and is not read", f"write it without {key}")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise DamagedCheckpoint(file=file, why="its quantization_config has no config_groups")
    return [_group(file, f"config_groups.{name}", group, quantization.get("format")) for name, group in groups.items()]


def _group(file: Path, name: str, group: Any, common: Any) -> tuple[list[str], Scheme]:
    weights = group.get("weights") if isinstance(group, dict) else None
    targets = group.get("targets") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise DamagedCheckpoint(file=file, why=f"{name} has no weights or no list of targets")
    if wrong := next((t for t in targets if not _is_target(t)), None):
        raise DamagedCheckpoint(file=file, why=f"the target {wrong!r} of {name} is no regular expression")
    form = group.get("format") or common
    if form not in (PACKED, INT):
        _unsupported(file, f"{name} has the format {form!r}")
    bits, size, symmetric = weights.get("num_bits"), weights.get("group_size"), weights.get("symmetric", True)
    strategy = weights.get("strategy") or ("group" if size not in (None, -1) else "channel" if size == -1 else "tensor")
    if weights.get("type", "int") != "int" or bits not in (BITS if form == PACKED else (8,)):
        _unsupported(file, f"{name} has weights of {bits!r} bits of type {weights.get('type', 'int')!r} in {form}")
    if strategy not in ("group", "channel") or (strategy == "group" and (type(size) is not int or size < 1)):
        _unsupported(file, f"{name} has the strategy {strategy!r} with group_size {size!r}")
    if weights.get("dynamic") or weights.get("actorder") not in (None, False, "weight", "static"):
        _unsupported(file, f"{name} has dynamic weights, or columns in the order of activations")
    if form == INT and symmetric is not True:
        _unsupported(file, f"{name} has zero points in {INT}")
    if group.get("output_activations"):
        _unsupported(file, f"{name} has output_activations")
    inputs = _activations(file, name, group.get("input_activations"), form)
    if inputs == "int8" and strategy != "channel":
        _unsupported(file, f"{name} has activations of int8 with the strategy {strategy!r}")
    return targets, Scheme(form, int(bits or 0), bool(symmetric), size if strategy == "group" else None, inputs)


def _activations(file: Path, name: str, inputs: Any, form: str) -> Activations:
    if not inputs:
        return "float"
    fits = isinstance(inputs, dict) and all(
        inputs.get(key, default) == want
        for key, default, want in (
            ("num_bits", 8, 8),
            ("type", "int", "int"),
            ("symmetric", True, True),
            ("dynamic", False, True),
            ("strategy", None, "token"),
        )
    )
    if form != INT or not fits:
        _unsupported(file, f"{name} has input_activations that are not int8, symmetric, dynamic for each token in {INT}")
    return "int8"


def _scheme_of(file: Path, groups: list[tuple[list[str], Scheme]], layer: str) -> Scheme:
    """The scheme of a layer: targets by name count before patterns, and these before the class."""
    for fits in (lambda t: t == layer, lambda t: _fits(layer, t), lambda t: t == "Linear"):
        for targets, scheme in groups:
            if any(fits(target) for target in targets):
                return scheme
    raise DamagedCheckpoint(file=file, why=f"no target of its config_groups fits {layer}, which is quantized")


def _check_symmetric(stored: Stored, name: str, scheme: Scheme) -> None:
    if scheme.symmetric and name in stored.tensors and bool(stored.tensors[name].any()):
        raise DamagedCheckpoint(file=stored.files[name], why=f"{name} is not zero, and {CONFIG} calls the weight symmetric")


def _read_packed(stored: Stored, name: str, scheme: Scheme) -> QuantizedWeight:
    packed, scale, zero, shape = (name + suffix for suffix in PARTS)
    beside = next(part for part in (packed, scale, zero, shape, name + ".weight") if part in stored.tensors)
    words = stored.take(packed, [torch.int32], (-1, -1), beside)
    rows, columns = (int(n) for n in stored.take(shape, [torch.int64, torch.int32], (2,), packed))
    wanted = [rows, -(-columns * scheme.bits // 32)]
    if min(rows, columns) < 1 or list(words.shape) != wanted:
        size = f"{[rows, columns]} of {scheme.bits} bits"
        why = f"{packed} is {list(words.shape)}, and {shape} says {size}, which takes {wanted}"
        raise DamagedCheckpoint(file=stored.files[packed], why=why)
    kind, scales = _read_scales(stored, scale, packed, (rows, columns), scheme)
    points = None
    if not scheme.symmetric:
        packed_rows = -(-rows * scheme.bits // 32)
        zeros = stored.take(zero, [torch.int32], (packed_rows, kind.groups), packed)
        points = unpack(zeros.t(), scheme.bits, rows).t()
    parts = kind.pack(unpack(words, scheme.bits, columns), scales, points)
    return QuantizedWeight(parts, stored.take_bias(name + ".bias", rows, packed))


def _read_int(stored: Stored, name: str, scheme: Scheme) -> QuantizedWeight:
    weight, scale = name + ".weight", name + ".weight_scale"
    beside = next(name + part for part in (*PARTS, ".weight") if name + part in stored.tensors)
    codes = stored.take(weight, [torch.int8], (-1, -1), beside)
    rows, columns = codes.shape
    if not codes.numel():
        raise DamagedCheckpoint(file=stored.files[weight], why=f"{weight} is empty: {[rows, columns]}")
    kind, scales = _read_scales(stored, scale, weight, (rows, columns), scheme)
    parts = kind.pack(codes.to(torch.int32) + kind.middle, scales)
    return QuantizedWeight(parts, stored.take_bias(name + ".bias", rows, weight), scheme.activations)


def _read_scales(
    stored: Stored, name: str, beside: str, shape: tuple[int, int], scheme: Scheme
) -> tuple[QuantizedType, Tensor]:
    rows, columns = shape
    group = scheme.group or columns
    if columns % group:
        _unsupported(
            stored.files[beside],
            f"groups of {group} do not divide the {columns} columns of {beside}",
            "quantize again with a group size that divides, or leave this layer in float",
        )
    scales = stored.take_scales(name, _FLOATS, (rows, columns // group), beside)
    layout = "bytes" if scheme.format == INT else best_layout(columns, group)
    return QuantizedType(shape, scheme.bits, group, scheme.symmetric, SCALE_OF[scales.dtype], layout), scales


# -- writing ------------------------------------------------------------------------------------------------------------


def write(folder: str | Path, checkpoint: Checkpoint, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a checkpoint to a folder, in shards of at most so many bytes.

    Layers with activations of int8 become int-quantized, others pack-quantized; each kind of weight is a config group. All
    of `checkpoint.config` but its `quantization_config` is kept; layers that are not quantized are added to `ignore`. Raises
    CannotWriteCheckpoint: the formats hold 4 and 8 bits, and scales that are floats.
    """
    tensors = [_written_layer(name, weight) for name, weight in checkpoint.quantized.items()]
    config = {**checkpoint.config, "quantization_config": _written_config(checkpoint)}
    write_folder(METHOD, folder, merged(METHOD, *tensors, checkpoint.plain), config, shard_bytes)


def _written_layer(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    kind = weight.parts.type
    if kind.bits not in BITS or len(kind.shape) != 2:
        _refuse(f"{name} is {kind}", "quantize it to a matrix of 4 or 8 bits, or leave it in float")
    if kind.scale == "e8m0":
        _refuse(f"{name} has scales that are exponents", "quantize it with scales of float16, bfloat16 or float32")
    codes, scales, zeros = unpacked(METHOD, name, weight)
    made = {".weight_scale": scales}
    if weight.activations == "int8":
        made[".weight"] = (codes - kind.middle).to(torch.int8)
    else:
        made[".weight_packed"] = pack(codes, kind.bits)
        made[".weight_shape"] = torch.tensor(kind.shape)
        if not kind.symmetric:
            made[".weight_zero_point"] = pack(zeros.t(), kind.bits).t()
    return {name + s: t for s, t in made.items()} | ({} if weight.bias is None else {name + ".bias": weight.bias})


def _refuse(why: str, way: str) -> None:
    raise CannotWriteCheckpoint(format=METHOD, why=why, way=way)


def _written_config(checkpoint: Checkpoint) -> dict[str, Any]:
    members: dict[Scheme, list[str]] = {}
    for name, weight in sorted(checkpoint.quantized.items()):
        members.setdefault(_written_scheme(weight, checkpoint), []).append(name)
    if not members:
        _refuse("no layer is quantized", "save the model as a float model")
    groups = {
        f"group_{i}": _written_group(scheme, names if len(members) > 1 else ["Linear"])
        for i, (scheme, names) in enumerate(members.items())
    }
    formats = {scheme.format for scheme in members}
    before = checkpoint.config.get("quantization_config") or {}
    listed = list(before.get("ignore") or []) if before.get("quant_method") == METHOD else []
    return {
        "quant_method": METHOD,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*listed, *(name for name in plain_layers(checkpoint) if not any(_fits(name, t) for t in listed))],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _is_target(target: str) -> bool:
    try:
        return bool(re.compile(target.removeprefix("re:")))
    except (re.error, RecursionError, OverflowError):
        return not target.startswith("re:")


def _fits(name: str, target: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _written_scheme(weight: QuantizedWeight, checkpoint: Checkpoint) -> Scheme:
    """A row that is one group is the strategy "channel", but where other layers have groups of its size."""
    kind = weight.parts.type
    if weight.activations == "int8":
        return Scheme(INT, 8, True, None, "int8")
    others = (w.parts.type for w in checkpoint.quantized.values() if w.activations == "float")
    grouped = any(other.group == kind.group and other.groups > 1 for other in others)
    return Scheme(PACKED, kind.bits, kind.symmetric, kind.group if grouped else None, "float")


def _written_group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    common = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.symmetric, "dynamic": False}
    strategy = "channel" if scheme.group is None else "group"
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "group_size": None, "dynamic": True}
    return {
        "targets": targets,
        "weights": {**common, "strategy": strategy, "group_size": scheme.group},
        "input_activations": inputs if scheme.activations == "int8" else None,
        "output_activations": None,
        "format": scheme.format,
    }


# -- packing ------------------------------------------------------------------------------------------------------------


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [A, C] from 0 to 2^bits - 1 as int32 [A, ceil(C * bits / 32)], the first in the lowest bits; bits divide 32."""
    per = 32 // bits
    padded = torch.nn.functional.pad(codes.to(torch.int32), (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    return (padded << torch.arange(per, device=codes.device, dtype=torch.int32) * bits).sum(-1, dtype=torch.int32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of `pack`: int32 [A, count]."""
    shifts = torch.arange(32 // bits, device=words.device, dtype=torch.int32) * bits
    return (words[..., None] >> shifts & ((1 << bits) - 1)).flatten(-2)[..., :count]
