"""Folders of safetensors files with a config.json: what every format of quantized checkpoints shares.

A checkpoint is read as a whole before anything is made of it, and written aside before it takes the place of an older one.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ...errors import CannotWriteCheckpoint, DamagedCheckpoint, UnsupportedCheckpoint
from ...formats import SCALES, Quantized
from .modules import Activations, QuantizedLinear

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
"""Bytes of a shard, unless one tensor alone is larger."""
SCALE_OF = {dtype: name for name, dtype in SCALES.items() if dtype.is_floating_point}
"""The scale of a quantized type by the dtype of stored scales."""


@dataclass(frozen=True)
class QuantizedWeight:
    """The quantized weight of a linear layer, its bias [N], and how the layer reads its input."""

    parts: Quantized
    bias: Tensor | None = None
    activations: Activations = "float"


@dataclass(frozen=True)
class Checkpoint:
    """A quantized model: weights of linear layers by the name of the layer, all other tensors by their own, config.json."""

    quantized: Mapping[str, QuantizedWeight]
    plain: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module, config: Mapping[str, Any] | None = None) -> Checkpoint:
        """The state of a model with QuantizedLinear layers; a tensor or layer with several names is taken under the first.

        `config` is the rest of config.json, such as `model.config.to_dict()`. Raises CannotWriteCheckpoint for a layer that
        scales its input, which no format holds.
        """
        quantized: dict[str, QuantizedWeight] = {}
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                if module.input_scale is not None:
                    raise CannotWriteCheckpoint(
                        format="quantized",
                        why=f"{name} multiplies its input by a scale, which checkpoints do not hold",
                        way=f"quantize {name} without scales (rtn or gptq), or leave it float (ignore), and write again",
                    )
                bias = None if module.bias is None else module.bias.detach()
                quantized[name] = QuantizedWeight(module.parts, bias, module.activations)
        layers = {n for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, QuantizedLinear)}
        plain: dict[str, Tensor] = {}
        seen: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name.rpartition(".")[0] not in layers and isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                plain[name] = tensor.detach()
        return Checkpoint(quantized, plain, dict(config or {}))


@dataclass(frozen=True)
class Stored:
    """Tensors of a checkpoint's files by name, and the file that each lies in."""

    tensors: Mapping[str, Tensor]
    files: Mapping[str, str]

    def take(self, name: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...], beside: str) -> Tensor:
        """A tensor that must be there with one of these dtypes and this shape; -1 is any size.

        `beside` is a tensor that asks for it. Raises DamagedCheckpoint.
        """
        found = self.tensors.get(name)
        if found is None:
            raise DamagedCheckpoint(file=self.files[beside], why=f"{name} is missing, which {beside} needs")
        fits = len(shape) == found.ndim and all(w in (-1, n) for w, n in zip(shape, found.shape, strict=True))
        if found.dtype not in dtypes or not fits:
            want = f"{' or '.join(map(_short, dtypes))} [{', '.join('?' if n < 0 else str(n) for n in shape)}]"
            got = f"{_short(found.dtype)} {list(found.shape)}"
            raise DamagedCheckpoint(file=self.files[name], why=f"{name} is {got}, not {want}")
        return found

    def take_scales(self, name: str, dtypes: Sequence[torch.dtype], shape: tuple[int, ...], beside: str) -> Tensor:
        """Like `take`, and every element must be finite."""
        found = self.take(name, dtypes, shape, beside)
        bad = int((~found.isfinite()).sum())
        if bad:
            raise DamagedCheckpoint(file=self.files[name], why=f"{name} has {bad} elements that are NaN or infinite")
        return found

    def take_bias(self, name: str, rows: int, beside: str) -> Tensor | None:
        """The bias of a layer, None where it has none. Raises DamagedCheckpoint."""
        floats = (torch.float16, torch.bfloat16, torch.float32)
        return self.take(name, floats, (rows,), beside) if name in self.tensors else None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- reading ------------------------------------------------------------------------------------------------------------


def read_config(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(config.json, the `quantization_config` in it). Raises DamagedCheckpoint, UnsupportedCheckpoint."""
    config = _read_json(folder / CONFIG)
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        raise UnsupportedCheckpoint(
            file=folder / CONFIG,
            why="it has no quantization_config, so the weights are not quantized",
            way="load it as a float model, for example with transformers' from_pretrained",
        )
    return config, quantization


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpoint(file=path, why="it is missing") from None
    except (OSError, ValueError, RecursionError) as e:
        raise DamagedCheckpoint(file=path, why=f"it is no JSON text ({e})") from None
    if not isinstance(found, dict):
        raise DamagedCheckpoint(file=path, why="it is no JSON object")
    return found


def read_tensors(folder: Path) -> Stored:
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json lists.

    Raises DamagedCheckpoint for files that are missing, cut off, or do not hold what the index says; UnsupportedCheckpoint
    where there are weights in another kind of file.
    """
    if not (folder / INDEX).exists():
        _refuse_pickles(folder)
    if (folder / SINGLE).exists() or not (folder / INDEX).exists():
        tensors = _read_file(folder / SINGLE)
        return Stored(tensors, dict.fromkeys(tensors, str(folder / SINGLE)))
    where = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) and Path(file).name == file for file in where.values()):
        raise DamagedCheckpoint(file=folder / INDEX, why="its weight_map does not give the name of a file for each tensor")
    tensors, files = {}, {}
    for shard in dict.fromkeys(where.values()):
        path = folder / shard
        listed = {name for name, file in where.items() if file == shard}
        found = _read_file(path)
        for names, what in ((listed - found.keys(), "is missing"), (found.keys() - listed, f"is not listed in {INDEX}")):
            if names:
                raise DamagedCheckpoint(file=path, why=f"{min(names)} {what}{_and_more(len(names) - 1)}")
        tensors.update(found)
        files.update(dict.fromkeys(found, str(path)))
    return Stored(tensors, files)


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickles and not (folder / SINGLE).exists():
        raise UnsupportedCheckpoint(
            file=folder / pickles[0],
            why="it is a pickle, and only safetensors files are read",
            way="convert it with the tool that wrote it, for example by save_pretrained(safe_serialization=True)",
        )


def _read_file(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise DamagedCheckpoint(file=path, why="it is missing")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as e:  # pyright: ignore[reportAttributeAccessIssue]
        raise DamagedCheckpoint(file=path, why=f"it is no whole safetensors file ({e})") from None


def _and_more(count: int) -> str:
    return f" (and {count} more)" if count else ""


# -- writing ------------------------------------------------------------------------------------------------------------


def plain_layers(checkpoint: Checkpoint) -> list[str]:
    """Layers with a matrix that is not quantized: what formats list so that readers leave them alone."""
    found = [n.removesuffix(".weight") for n, t in sorted(checkpoint.plain.items()) if n.endswith(".weight") and t.ndim == 2]
    return [name for name in found if name not in checkpoint.quantized]


def unpacked(format: str, name: str, weight: QuantizedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [N, K], scales [N, G] as they are stored, zeros [N, G]) of a weight that is to be written.

    Raises CannotWriteCheckpoint for scales that are NaN or infinite, and for zero points that are no codes.
    """
    kind = weight.parts.type
    codes, _, zeros = kind.unpack(*weight.parts[1:])
    scales = kind.row_scales(weight.parts.scales)
    finite = bool(scales.isfinite().all())
    if not finite or int(zeros.max()) > kind.levels:
        raise CannotWriteCheckpoint(
            format=format,
            why=f"the {'zero points' if finite else 'scales'} of {name} are not all {'codes' if finite else 'finite'}",
            way="quantize this layer again from finite weights, or leave it in float",
        )
    return codes, scales, zeros


def merged(format: str, *sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors to write from several sources. Raises CannotWriteCheckpoint where two have a name in common."""
    made: dict[str, Tensor] = {}
    for source in sources:
        for name in source:
            if name in made:
                raise CannotWriteCheckpoint(
                    format=format,
                    why=f"there are two tensors called {name}",
                    way="leave the float weight of a quantized layer out of the plain tensors",
                )
        made.update(source)
    return made


def write_folder(
    format: str,
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write tensors and config.json to a folder, in shards of at most so many bytes.

    The files are written aside first. An older checkpoint in the folder is replaced as a whole, and stays where writing
    fails; other files of the folder stay in any case. Raises CannotWriteCheckpoint.
    """
    target = Path(folder).resolve()
    try:
        with _aside(target) as new:
            _write_shards(new, tensors, shard_bytes)
            (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            if target.exists():
                _keep_others(target, new)
            _swap(new, target)
    except (OSError, TypeError, safetensors.SafetensorError) as e:  # pyright: ignore[reportAttributeAccessIssue]
        raise CannotWriteCheckpoint(
            format=format,
            why=f"{target}: {e}",
            way="make room there, or name a folder that can be written to; what was there is as it was",
        ) from e


def _write_shards(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    where: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        apart = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in shard.items()}
        safetensors.torch.save_file(apart, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _aside(target: Path) -> Iterator[Path]:
    """A new folder beside the target; what is left of it in the end is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    new = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}")
    new.mkdir()
    try:
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    """Put a folder in the place of another, which is removed last."""
    if not target.exists():
        new.rename(target)
        return
    old = new.with_name(new.name + ".old")
    target.rename(old)
    try:
        new.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_old(path: Path) -> bool:
    """Whether a file belongs to an older checkpoint, which a new one replaces."""
    return path.name in (CONFIG, SINGLE, INDEX) or (path.name.startswith("model-") and path.suffix == ".safetensors")


def _keep_others(old: Path, new: Path) -> None:
    for path in old.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=_link)
        elif not _is_old(path):
            _link(str(path), str(new / path.name))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)
