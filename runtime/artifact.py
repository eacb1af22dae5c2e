"""Artifacts: a compiled model in one file that runs without the compiler.

    manifest.json             format version, versions, targets, inputs, outputs, structure, passes, numerics, checksums
    plan.json                 what runs (`plan.py`)
    plans/<target>.json       the same for device targets, such as cuda-90
    weights.safetensors       the constants, used in place through a memory map
    graphs/<level>.txt        the graphs as text
    kernels/src/*.cpp, *.h    sources, from which kernels are rebuilt where no binary fits; *.py: Triton kernels
    kernels/bin/<target>/*    shared objects per CPU target, cubins per device target

Buffers that the model writes are among the constants; each loaded model has its own copy of these, see `LoadedModel`.

An artifact holds machine code. Checksums find damage, not malice: load only files whose origin you trust. Do not truncate
a file in place while a process has it loaded.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import DamagedArtifact, KernelMissing, StructureNotPortable
from . import devices, machine, native, sizes, weights
from .archive import MANIFEST, Archive, Content, write_archive
from .binaries import SOURCES, kernel_names, load_device, load_native, target_folder
from .check import check
from .cuda import DeviceBinary
from .executor import Executable
from .plan import InputSpec, Plan, from_json, to_json
from .state import private, written_constants, written_inputs
from .structure import Structure

PLAN, WEIGHTS = "plan.json", "weights.safetensors"


@dataclass(frozen=True)
class Parts:
    """What an artifact is written from.

    plan is what runs on `target`; device_plans are further plans of the same model by target ("cuda:90"), over the same
    inputs, outputs and weights. in_tree is the structure of `(args, kwargs)`, whose leaves are the plan's inputs; out_tree
    that of the result, whose leaves are the plan's outputs. sources: file name -> text, each `*.cpp` a translation unit
    whose functions are named like the plan's kernels, each `*.py` a Triton module, the rest headers. binaries: CPU target
    (a key of `machine.TARGETS`) -> file name -> bytes; every target needs a `runner.so`, built from `native.SOURCE`.
    device_binaries: by kernel. build: compiler flags for rebuilding, without an architecture. info: further plain data
    for the manifest (versions, passes, numerics, coverage, guards). state: the names of weights that the model writes, by
    the model's own names, in the order in which the graphs take them; tied ones have several.
    """

    plan: Plan
    weights: Mapping[str, torch.Tensor]
    in_tree: pytree.TreeSpec
    out_tree: pytree.TreeSpec
    graphs: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    binaries: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)
    device_binaries: Mapping[str, Sequence[DeviceBinary]] = field(default_factory=dict)
    build: Sequence[str] = native.FLAGS
    info: Mapping[str, Any] = field(default_factory=dict)
    target: str = "cpu"
    device_plans: Mapping[str, Plan] = field(default_factory=dict)
    state: Mapping[str, str] = field(default_factory=dict)


def write(path: str | os.PathLike[str], parts: Parts) -> None:
    """Write an artifact. Equal parts give equal bytes; the file appears complete or not at all.

    Raises UnsafePlan, KernelMissing for a target without runner, StructureNotPortable for arguments or results that JSON
    cannot describe, ValueError for a weight of a dtype that safetensors files do not have.
    """
    plans = {parts.target: (PLAN, parts.plan)}
    plans |= {t: (f"plans/{t.replace(':', '-')}.json", plan) for t, plan in parts.device_plans.items()}
    for _, plan in plans.values():
        check(plan)
        _require(parts.device_binaries, kernel_names(plan, "triton"))
    native_kernels = kernel_names(parts.plan, "cpp")
    sources = {**parts.sources, native.SOURCE.name: native.SOURCE.read_text()} if native_kernels else parts.sources
    members: dict[str, Content] = {f"graphs/{level}.txt": text.encode() for level, text in parts.graphs.items()}
    members |= {SOURCES + name: text.encode() for name, text in sources.items()}
    for target, files in parts.binaries.items():
        if native_kernels and "runner.so" not in files:
            raise KernelMissing(kind="binary", name=f"{target}/runner.so")
        members |= {target_folder(target) + name: content for name, content in files.items()}
    device_kernels = _device_members(parts.device_binaries, members)
    stored, tied, strides = _distinct(parts.weights)
    members[WEIGHTS] = weights.serialise(stored)
    for name, plan in plans.values():
        members[name] = json.dumps(to_json(plan), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    targets = {name: machine.TARGETS[name] for name in parts.binaries}
    manifest = {
        **parts.info,
        "inputs": _describe_inputs(parts.plan),
        "outputs": _describe_outputs(parts.plan),
        "structure": {"inputs": _dump_tree(parts.in_tree, "inputs"), "outputs": _dump_tree(parts.out_tree, "outputs")},
        "symbols": to_json(parts.plan)["symbols"],
        "plans": {target: name for target, (name, _) in plans.items()},
        "targets": {n: {"machine": t.machine, "requires": sorted(t.requires)} for n, t in targets.items()},
        "build": list(parts.build),
        "weights": {"tied": tied, "strides": strides},
        "state": [list(pair) for pair in parts.state.items()],
        "device_kernels": device_kernels,
    }
    write_archive(path, manifest, members)


def _require(binaries: Mapping[str, Any], names: list[str]) -> None:
    for name in names:
        if not binaries.get(name):
            raise KernelMissing(kind="binary", name=name)


def _device_members(kernels: Mapping[str, Sequence[DeviceBinary]], members: dict[str, Content]) -> dict[str, Any]:
    """Adds device binaries to `members`; the manifest's list of them."""
    listed: dict[str, Any] = {}
    for name, binaries in kernels.items():
        for number, b in enumerate(binaries):
            stem = f"{target_folder(b.target)}{name}-{number}"
            entry = {"header": b.header(), "binary": f"{stem}.bin", "assembly": f"{stem}.txt"}
            members[entry["binary"]], members[entry["assembly"]] = b.binary, b.assembly.encode()
            listed.setdefault(name, []).append(entry)
    return listed


def _distinct(
    tensors: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, str], dict[str, list[int]]]:
    """(tensors to store, name -> name of the one that it is the same as, strides of those that are not contiguous)."""
    stored, tied, strides, seen = {}, {}, {}, {}
    for name, t in sorted(tensors.items()):
        key = (t.data_ptr(), t.dtype, t.shape, t.stride(), t.device)
        if t.numel() and key in seen:
            tied[name] = seen[key]
            continue
        seen[key] = name
        stored[name] = t
        if not t.is_contiguous():
            strides[name] = list(t.stride())
    return stored, tied, strides


def _describe_inputs(plan: Plan) -> list[dict[str, Any]]:
    written = written_inputs(plan)
    return [_describe_input(spec) | ({"written": True} if i in written else {}) for i, spec in enumerate(plan.inputs)]


def _describe_input(spec: InputSpec) -> dict[str, Any]:
    shape = [sizes.text(n) for n in spec.shape]
    tensor = {"dtype": spec.dtype, "device": spec.device, "shape": shape} if spec.kind == "tensor" else {}
    return {"name": spec.name, "kind": spec.kind, **tensor}


def _describe_outputs(plan: Plan) -> list[dict[str, Any]]:
    values = {v.id: v for v in plan.values}
    found = []
    for out in plan.outputs:
        if out.kind == "value":
            v = values[out.ref]  # type: ignore[index]
            shape = [sizes.text(n) for n in v.shape]
            found.append({"kind": "tensor", "dtype": v.dtype, "device": v.device, "shape": shape})
        else:
            found.append({"kind": "int" if out.kind == "size" else out.kind})
    return found


def _dump_tree(tree: pytree.TreeSpec, which: str) -> Any:
    try:
        return json.loads(pytree.treespec_dumps(tree))
    except (NotImplementedError, TypeError) as error:
        raise StructureNotPortable(which=which, verb="stored", why=error) from None


def _load_tree(manifest: Mapping[str, Any], which: str) -> pytree.TreeSpec:
    try:
        return pytree.treespec_loads(json.dumps(manifest["structure"][which]))
    except NotImplementedError as error:
        raise StructureNotPortable(which=which, verb="restored", why=error) from None
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        raise DamagedArtifact(part=MANIFEST, why=f"its structure of the {which} is ill-formed") from None


def load(path: str | os.PathLike[str], device: str | torch.device | None = None) -> LoadedModel:
    """Load an artifact, ready to call. Needs torch, and a compiler only where no binary fits this machine.

    It runs on `device`, which its inputs must lie on: by default on the current CUDA device where there is one that it was
    compiled for, else on the CPU. Raises NotAnArtifact, ArtifactVersion, DamagedArtifact before anything of it runs;
    DeviceNotAvailable, NoBinaryFits and what is said there where its kernels cannot run here; UnsafePlan, OpNotAvailable
    where its plan cannot.
    """
    archive = Archive(path)
    plans = plan_members(archive.manifest)
    target, chosen = devices.choose(plans, device)
    plan = from_json(archive.json(plans[target]))
    check(plan)
    plan = devices.place(plan, chosen)
    in_tree, out_tree = (_load_tree(archive.manifest, which) for which in ("inputs", "outputs"))
    for tree, leaves, which in ((in_tree, len(plan.inputs), "inputs"), (out_tree, len(plan.outputs), "outputs")):
        if tree.num_leaves != leaves:
            raise DamagedArtifact(part=MANIFEST, why=f"it describes {tree.num_leaves} {which}, the plan has {leaves}")
    addresses, runner = load_native(archive, kernel_names(plan, "cpp"))
    kernels = {**addresses, **load_device(archive, kernel_names(plan, "triton"), chosen.index or 0)}
    constants = load_weights(archive, plan)
    names = state_names(archive.manifest, constants)
    constants |= {weight: private(constants[weight]) for weight in {*names.values(), *written_constants(plan)}}
    state = {name: constants[weight] for name, weight in names.items()}
    executable = Executable(plan, kernels, constants, runner=runner)
    return LoadedModel(archive, executable, _structure(in_tree, out_tree), target, chosen, state)


def _structure(in_tree: pytree.TreeSpec, out_tree: pytree.TreeSpec) -> Structure:
    try:
        return Structure(in_tree, out_tree)
    except ValueError as error:
        raise DamagedArtifact(part=MANIFEST, why=str(error)) from None


def state_names(manifest: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, str]:
    """The weights that the model writes, by the model's names for them, in the order in which its graphs take them.

    Raises DamagedArtifact.
    """
    try:
        names = {str(name): str(weight) for name, weight in manifest.get("state", [])}  # older artifacts hold no state
    except (TypeError, ValueError):
        names = None
    if names is None or any(weight not in known for weight in names.values()):
        raise DamagedArtifact(part=MANIFEST, why="its list of buffers is ill-formed")
    return names


def plan_members(manifest: Mapping[str, Any]) -> dict[str, str]:
    """The members that hold an artifact's plans, by target, the first that of the model as captured.

    Raises DamagedArtifact.
    """
    plans = manifest.get("plans")
    if not isinstance(plans, dict) or not plans or not all(isinstance(name, str) for name in plans.values()):
        raise DamagedArtifact(part=MANIFEST, why="its list of plans is ill-formed")
    return dict(sorted(plans.items(), key=lambda entry: (entry[1] != PLAN, entry[0])))


def load_weights(archive: Archive, plan: Plan) -> dict[str, torch.Tensor]:
    """The weights that a plan names, mapped from the file. Raises DamagedArtifact."""
    start = archive.offset(WEIGHTS)
    tensors = weights.read(archive.map, start, start + len(archive.view(WEIGHTS)), WEIGHTS)
    notes = archive.manifest.get("weights")
    try:
        for name, strides in notes["strides"].items():  # type: ignore[index]
            t = tensors[name]
            tensors[name] = torch.empty_strided(t.shape, strides, dtype=t.dtype).copy_(t)
        tensors |= {name: tensors[same] for name, same in notes["tied"].items()}  # type: ignore[index]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedArtifact(part=MANIFEST, why=f"its notes on weights are ill-formed: {error}") from None
    if any(weights.source(str(v.ref)) not in tensors for v in weights.constants(plan)):  # a device's plan reads no panels
        tensors = weights.originals(tensors)
    for v in weights.constants(plan):
        t = tensors.get(weights.source(str(v.ref)))
        if t is None or str(t.dtype) != f"torch.{v.dtype}" or list(t.shape) != list(v.shape):
            raise DamagedArtifact(part=WEIGHTS, why=f"the weight {v.ref!r} is missing or not what the plan expects")
        if t.numel() > 1 and any(n > 1 and a != b for n, a, b in zip(t.shape, t.stride(), v.strides, strict=True)):
            raise DamagedArtifact(part=WEIGHTS, why=f"the weight {v.ref!r} has strides {t.stride()}, not {v.strides}")
    return weights.placed(plan, tensors)


class LoadedModel:
    """A model loaded from an artifact. Call it like the model that was compiled.

    manifest: what the artifact says of itself. target, device: what its plan was compiled for, and where it runs. inputs,
    outputs: name, kind, dtype, device and shape of each flat input and result, sizes as text; `written` for inputs that a
    call writes, as the model does. coverage: which part of the model runs in generated kernels, and why the rest does not.

    state: the buffers that the model writes, by its own names, tied ones under each. They begin as they were when the
    artifact was saved, belong to this object alone (load again for others, the file never changes), and are what the
    calls so far have made of them. Read them, or set them in place: `loaded.state["count"].zero_()`.

    Calls may overlap in threads. Those of a model with state take turns, so that each sees the writes of the one before,
    in whatever order the threads arrive; on a CUDA device the turns order what is queued, so queue it on one stream. A call
    that raises on the way may have written some of its buffers.
    """

    def __init__(
        self, archive: Archive, executable: Executable, structure: Structure, target: str, device: torch.device,
        state: Mapping[str, torch.Tensor],
    ) -> None:  # fmt: skip
        self._archive = archive
        self.executable = executable
        self._structure = structure
        self.manifest: dict[str, Any] = archive.manifest
        self.target, self.device = target, device
        self.state = MappingProxyType(dict(state))
        self._turn = threading.RLock()
        self.inputs = _describe_inputs(executable.plan)
        self.outputs = _describe_outputs(executable.plan)
        self.coverage: Any = self.manifest.get("device_coverage", {}).get(target, self.manifest.get("coverage"))

    @property
    def graphs(self) -> dict[str, str]:
        """The graphs as text, by level."""
        names = [n for n in self._archive.names if n.startswith("graphs/")]
        return {n.removeprefix("graphs/").removesuffix(".txt"): self._archive.text(n) for n in names}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model. Raises the WrongInput* errors for inputs that it was not compiled for, SharedMemory for those that
        share memory with what it writes."""
        flat = self._structure.flatten(args, kwargs)
        if not self.state:
            return self._structure.unflatten(self.executable.run(flat))
        with self._turn:
            return self._structure.unflatten(self.executable.run(flat))
