"""Checkpoints of any format that is read, and putting them into a float model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import CheckpointMismatch, UnsupportedCheckpoint
from ...formats import Quantized
from . import awq_format, compressed_format
from .checkpoints import CONFIG, Checkpoint, QuantizedWeight, read_config
from .modules import QuantizedLinear, replace_linears, why_not_replaced

READERS = {awq_format.METHOD: awq_format.read, compressed_format.METHOD: compressed_format.read}
"""What reads a checkpoint, by the quant_method of its config."""
_SHOWN = 20


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """A checkpoint from a folder, in the format that its config.json names.

    Raises DamagedCheckpoint, UnsupportedCheckpoint.
    """
    path = Path(folder)
    method = read_config(path)[1].get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise UnsupportedCheckpoint(
            file=path / CONFIG,
            why=f"its quant_method is {method!r}",
            way=f"quantize the model anew, or convert the checkpoint to {' or '.join(READERS)}",
        )
    return READERS[method](path)


def load_quantized(model: nn.Module, folder: str | Path) -> None:
    """Put a quantized checkpoint into a float model, in place: its layers become QuantizedLinear, other tensors are copied.

    Tensors go to the device of what they replace, biases and plain tensors in its dtype (on "meta" they are taken as they
    are). The model stays as it was where an error is raised. Raises DamagedCheckpoint, UnsupportedCheckpoint, and
    CheckpointMismatch, which lists names and sizes that the two do not share.
    """
    checkpoint = read_checkpoint(folder)
    _compare(model, checkpoint, folder)
    layers = dict(model.named_modules(remove_duplicate=False))
    replace_linears(model, {name: _layer(layers[name], weight) for name, weight in checkpoint.quantized.items()})
    fresh = any(t.is_meta for t in model.state_dict().values())
    model.load_state_dict(dict(checkpoint.plain), strict=False, assign=fresh)


def _layer(old: nn.Module, weight: QuantizedWeight) -> QuantizedLinear:
    assert isinstance(old, nn.Linear)
    place = torch.device("cpu") if old.weight.is_meta else old.weight.device
    kind, codes, scales, zeros = weight.parts
    parts = Quantized(kind, codes.to(place), scales.to(place), None if zeros is None else zeros.to(place))
    made = QuantizedLinear(parts, None, weight.activations)
    if weight.bias is not None:
        dtype = weight.bias.dtype if old.bias.is_meta else old.bias.dtype
        made.bias = nn.Parameter(weight.bias.to(place, dtype, copy=True), requires_grad=old.bias.requires_grad)
    return made.train(old.training)


def _compare(model: nn.Module, checkpoint: Checkpoint, folder: str | Path) -> None:
    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    layers = dict(model.named_modules(remove_duplicate=False))
    same = {id(layers[n]) for n in checkpoint.quantized if n in layers}
    replaced = [n for n, m in layers.items() if id(m) in same]
    wanted = {n: t for n, t in state.items() if n.rpartition(".")[0] not in replaced}
    buffers = {n for n, _ in model.named_buffers(remove_duplicate=False)} - state.keys()  # not stored as a rule
    held = {id(wanted[n]) for n in checkpoint.plain if n in wanted}
    unlike = [f"{n}: {why}" for n, w in checkpoint.quantized.items() if (why := why_not_replaced(model, n, w.parts.type))]
    for name, weight in checkpoint.quantized.items():
        old = layers.get(name)
        if isinstance(old, nn.Linear) and (old.bias is None) != (weight.bias is None):
            one, other = ("the model", "the checkpoint") if weight.bias is None else ("the checkpoint", "the model")
            unlike.append(f"{name}: {one} has a bias, and {other} has none")
    unlike += [
        f"{n} is {t.dtype} {list(t.shape)} in the checkpoint and {wanted[n].dtype} {list(wanted[n].shape)} in the model"
        for n, t in checkpoint.plain.items()
        if n in wanted and (t.shape != wanted[n].shape or t.dtype.is_floating_point != wanted[n].dtype.is_floating_point)
    ]
    problems = [
        _listed("missing", (n for n, t in wanted.items() if n not in checkpoint.plain and id(t) not in held)),
        _listed("unexpected", (n for n in checkpoint.plain if n not in wanted and n not in buffers)),
        _listed("different", unlike),
    ]
    if any(problems):
        raise CheckpointMismatch(folder=folder, why="; ".join(filter(None, problems)))


def _listed(what: str, names: Iterable[str]) -> str:
    found = list(names)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"{what}: {', '.join(found[:_SHOWN])}{more}" if found else ""
