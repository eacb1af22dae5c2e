"""What `plait.quantize` gives: a quantized program with its report, as a callable, a module, an artifact or a checkpoint."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from ...errors import CannotReplace
from ...ir import Graph
from ...ir.quantized_rules import DYNAMIC, LINEAR
from ...passes.base import Step
from ...passes.quantize.linears import linears
from ...passes.quantize.observe import Batches
from ...passes.quantize.quantization import Layer, Quantization
from ..api import CompiledModel
from ..debugging.walk import Walk
from ..export import Exported, name_of
from ..options import Options
from ..pipelines import Session
from ..terminal import size, table
from . import awq_format, compressed_format, page
from .checkpoints import Checkpoint
from .modules import QuantizedLinear, replace_linears
from .plan import Plan, error_of

_PARTS = {LINEAR: 4, DYNAMIC: 3}  # where the parts of the weight end among the arguments; they begin behind the input


@dataclass(frozen=True)
class Skipped:
    """A layer that stays float, and why."""

    name: str
    why: str


ROLES = ("embedding", "linear layer", "other")
"""What a weight that is held as it was is for: other are norms, biases, factors of inputs, and buffers."""


@dataclass(frozen=True)
class Kept:
    """A weight that is held as it was, one of `ROLES`."""

    name: str
    role: str
    nbytes: int


class QuantizedModel:
    """A quantized program. Call it like the original: the first call compiles it, see `compile`.

    `layers` say what each quantized layer is held as and what that cost, `skipped` which layers stay float and why, `kept`
    all weights that are held as they were; print the object for a report. `plan` is what was chosen from where a budget was
    given. `captured` and `graph` are the graph before and after; `batches` are the calibration data as its inputs.
    """

    def __init__(
        self,
        model: Any,
        exported: Exported,
        step: Step,
        done: Quantization,
        skipped: tuple[Skipped, ...],
        options: Options,
        batches: Batches,
        plan: Plan | None = None,
    ) -> None:
        self.captured: Graph = exported.graph
        self.graph: Graph = step.after
        self.step = step
        self.layers: tuple[Layer, ...] = done.layers
        self.skipped = skipped
        self.kept = _kept(self.graph)
        self.batches = batches
        self.plan = plan
        self._model, self._exported, self._done, self._options = model, exported, done, options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program, compiled with the options that `plait.quantize` was given."""
        return self._compiled(*args, **kwargs)

    @cached_property
    def _compiled(self) -> CompiledModel:
        return self.compile()

    def compile(self, *, passes: Iterable[Any] | None = None, options: Mapping[str, Any] | None = None) -> CompiledModel:
        """Compile the quantized program as `plait.compile` does; its history begins with the pass that quantized it."""
        chosen = self._options if passes is None and options is None else Options.of(options, passes=passes)
        return self._walk(chosen, build=True)

    def _walk(self, chosen: Options, *, build: bool) -> CompiledModel:
        session, started = Session(name_of(self._model), chosen), time.perf_counter()
        walk = Walk(self.graph, "forward", self._exported.inputs, session)
        graph = walk.finish()
        return CompiledModel(self._exported, graph, (self.step, *walk.history), session, started if build else None)

    def prepare(self) -> CompiledModel:
        """`compile` without building kernels for this machine: for looking at them, and for artifacts, which build their
        own."""
        return self._walk(self._options, build=False)

    def save(self, path: str | Path, **how: Any) -> None:
        """Write an artifact that `plait.load` runs without the compiler; see `compiler.aot.save` for `how`."""
        self.prepare().save(path, **how)

    def report(self, path: str | Path) -> None:
        """Write one HTML page with all of this, which refers to nothing outside itself. Computes `error`."""
        Path(path).write_text(page.render(self, name_of(self._model)), encoding="utf-8")

    @cached_property
    def error(self) -> float:
        """The relative error, root mean square, of the program's floating-point results on the calibration data, computed by
        running the graph before and after on them, op by op."""
        return error_of(self.step, self.batches) if self.plan is None else self.plan.error

    def module(self) -> nn.Module:
        """A copy of the model that was quantized, with QuantizedLinear where its layers were, to be run by torch, exported,
        trained around, or compiled in another form (one token at a time with a cache, for example).

        Raises CannotReplace where a layer is no module of the model.
        """
        model = self._model.module() if isinstance(self._model, ExportedProgram) else self._model
        if not isinstance(model, nn.Module):
            names = ", ".join(self._done.held)
            raise CannotReplace(name=names, why="the model is a function, which has no modules")
        layers = dict(model.named_modules(remove_duplicate=False))
        weights = [m.weight for name in self._done.held if isinstance(m := layers.get(name), nn.Linear)]
        counts = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
        left = {id(w): nn.Parameter(w.to("meta"), requires_grad=False) for w in weights if counts[id(w)] == 1}
        made = copy.deepcopy(model, left)
        with torch.no_grad():
            for name, tensor in self._done.changed.items():
                _find(made, name).copy_(tensor)
        layers = dict(made.named_modules(remove_duplicate=False))
        forms = {layer.name: layer.format for layer in self.layers}
        replace_linears(
            made,
            {
                name: QuantizedLinear(
                    parts,
                    getattr(layers.get(name), "bias", None),
                    "int8" if forms[name].dynamic else "float",
                    self._done.inputs.get(name),
                )
                for name, parts in self._done.held.items()
            },
        )
        return made.eval()

    def checkpoint(self, config: Mapping[str, Any] | None = None) -> Checkpoint:
        """The state of `module()` for other people's formats; `config` is the rest of config.json."""
        own = getattr(getattr(self._model, "config", None), "to_dict", dict)
        return Checkpoint.of(self.module(), own() if config is None else config)

    def save_awq(self, folder: str | Path) -> None:
        """Write the AutoAWQ layout ("gemm") as Hugging Face reads it. Raises CannotWriteCheckpoint."""
        awq_format.write(folder, self.checkpoint())

    def save_compressed(self, folder: str | Path) -> None:
        """Write the compressed-tensors layout. Raises CannotWriteCheckpoint."""
        compressed_format.write(folder, self.checkpoint())

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized weights."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def float_bytes(self) -> int:
        """Bytes of the same weights before."""
        return sum(layer.float_bytes for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the quantized weights, all parts, for each weight."""
        return 8 * self.nbytes / max(1, sum(layer.type.rows * layer.type.columns for layer in self.layers))

    def as_json(self) -> dict[str, Any]:
        """The report as data, without `error`, which takes time."""
        rows = [
            {**asdict(layer), "format": str(layer.format), "type": str(layer.type), "bytes": layer.nbytes}
            for layer in self.layers
        ]
        return {
            "layers": rows,
            "skipped": [asdict(one) for one in self.skipped],
            "bytes": self.nbytes,
            "float_bytes": self.float_bytes,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "kept": [{"name": one.name, "role": one.role, "bytes": one.nbytes} for one in self.kept],
            "plan": self.plan and self.plan.as_json(),
        }

    def totals(self) -> list[str]:
        """The sizes, a line each: of the quantized weights, and of those held as they were, by what they are for."""
        lines: list[str] = []
        if self.layers:
            lines.append(
                f"{len(self.layers)} layers of {size(self.nbytes)}, {self.bits_per_weight:.2f} bits for each weight; "
                f"{size(self.float_bytes)} before"
            )
        by_role = {role: [one.nbytes for one in self.kept if one.role == role] for role in ROLES}
        texts = [f"{role}s {size(sum(found))} ({len(found)})" for role, found in by_role.items() if found]
        return [*lines, f"held as they were: {', '.join(texts) or 'none'}"]

    def __str__(self) -> str:
        return "\n\n".join([report(self.layers, self.skipped), "\n".join(self.totals())])

    def __repr__(self) -> str:
        return f"<QuantizedModel {name_of(self._model)}: {len(self.layers)} layers, {len(self.skipped)} stay float>"


def report(layers: Iterable[Layer], skipped: Iterable[Skipped]) -> str:
    """Layers with their losses, round-to-nearest -> result, then those that stay float."""
    rows = [
        (
            layer.name, str(layer.type).partition("[")[0], f"{layer.nearest_loss:.2e}", f"{layer.loss:.2e}", layer.how,
            size(layer.nbytes), layer.note,
        )
        for layer in layers
    ]  # fmt: skip
    parts = [table(("layer", "held as", "nearest", "loss", "by", "size", ""), rows)] if rows else ["no layer is quantized"]
    left = [(one.name, one.why) for one in skipped]
    return "\n\n".join([*parts, *([table(("stays float", "why"), left)] if left else [])])


def _kept(graph: Graph) -> tuple[Kept, ...]:
    """Weights of a graph that are no parts of quantized ones."""
    parts = {v for node in graph.nodes for v in node.args[1 : _PARTS.get(node.op.name, 1)]}
    layers = {one.weight for one in linears(graph)}
    found: list[Kept] = []
    for node in graph.nodes:
        if node.op.name == "plait.constant" and node.out not in parts:
            looked_up = any(user.op.name.startswith("aten.embedding") for user in graph.users.get(node.out, ()))
            role = ROLES[0] if looked_up else ROLES[1] if node.out in layers else ROLES[2]
            found.append(Kept(node.args[0], role, graph.constants[node.args[0]].nbytes))
    return tuple(found)


def _find(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, last = name.rpartition(".")
    return getattr(model.get_submodule(owner), last)
