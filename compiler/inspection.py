"""Looking into artifacts without running them: a summary, the plan as text, and texts to compare."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import NoSuchPart
from ..runtime import weights
from ..runtime.archive import Archive
from ..runtime.artifact import PLAN, WEIGHTS, plan_members, state_names
from ..runtime.binaries import BINARIES, SOURCES, kernel_names
from ..runtime.plan import Call, Launch, Plan, ValueSpec, from_json
from ..runtime.sizes import text as size_text

GRAPHS = "graphs/"


def summary(path: str | Path) -> dict[str, Any]:
    """What an artifact is, as plain data. Raises NotAnArtifact, ArtifactVersion, DamagedArtifact."""
    archive = Archive(path)
    manifest, plan = archive.manifest, plan_of(archive)
    counts = {k: v for k, v in (manifest.get("coverage") or {}).items() if k != "reported"}
    return {
        "file": str(path),
        "bytes": Path(path).stat().st_size,
        "versions": manifest.get("versions", {}),
        "inputs": [describe(v) for v in manifest["inputs"]],
        "outputs": [describe(v) for v in manifest["outputs"]],
        "state": state(manifest, plan),
        "symbols": {s.name: f"{s.low}..{'' if s.high is None else s.high}" for s in plan.symbols},
        "targets": sorted(manifest.get("targets", {})) + device_targets(manifest),
        "passes": [p["name"] for p in manifest.get("passes", [])],
        "coverage": counts,
        **_work(plan),
        "device_plans": {t: _work(plan_of(archive, t)) for t in list(plan_members(manifest))[1:]},
        "weight_bytes": len(archive.view(WEIGHTS)),
        "graphs": sorted([*graphs(archive), "plan"]),
    }


def state(manifest: Mapping[str, Any], plan: Plan) -> list[str]:
    """Buffers that a call writes, as the artifact begins with them: `count: int64[]`, tied ones `a = b: float32[4]`."""
    constants = {str(v.ref): v for v in weights.constants(plan)}
    names: dict[str, list[str]] = {}
    for name, weight in state_names(manifest, constants).items():
        names.setdefault(weight, []).append(name)
    return [
        f"{' = '.join(tied)}: {v.dtype}[{','.join(map(size_text, v.shape))}]"
        for weight, tied in names.items()
        for v in (constants[weight],)
    ]


def _work(plan: Plan) -> dict[str, Any]:
    return {
        "steps": {"kernel launches": count(plan, Launch), "torch calls": count(plan, Call)},
        "kernels": len([*kernel_names(plan, "cpp"), *kernel_names(plan, "triton")]),
    }


def plan_of(archive: Archive, target: str | None = None) -> Plan:
    """The artifact's plan for a target; without one, that of the model as captured.

    Raises NoSuchPart, DamagedArtifact, ArtifactVersion.
    """
    plans = plan_members(archive.manifest)
    if target is not None and target not in plans:
        raise NoSuchPart(path=archive.path, what=f"plan for {target!r}", known=", ".join(plans))
    return from_json(archive.json(PLAN if target is None else plans[target]))


def graphs(archive: Archive) -> dict[str, str]:
    """Stored graphs as text, by level."""
    names = [n for n in archive.names if n.startswith(GRAPHS)]
    return {n.removeprefix(GRAPHS).removesuffix(".txt"): archive.text(n) for n in names}


def graph(path: str | Path, level: str, target: str | None = None) -> str:
    """One graph of an artifact as text; level "plan" is the plan, for `target`. Raises NoSuchPart."""
    archive = Archive(path)
    found = graphs(archive)
    if level == "plan":
        return plan_text(plan_of(archive, target))
    if level not in found:
        raise NoSuchPart(path=path, what=f"graph {level!r}", known=", ".join([*found, "plan"]))
    return found[level]


def kernels(path: str | Path) -> dict[str, str]:
    """The source text of every kernel, by file name."""
    archive = Archive(path)
    return {n.removeprefix(SOURCES): archive.text(n) for n in archive.names if n.startswith(SOURCES)}


def coverage(path: str | Path, target: str | None = None) -> dict[str, Any]:
    """What runs each node, as plain data; `reported` lists nodes that run in torch: op, kind, reason, the user's line.

    Raises NoSuchPart for a target that the artifact has no plan for.
    """
    archive = Archive(path)
    plan_of(archive, target)
    found = archive.manifest.get("device_coverage", {}).get(target) or archive.manifest.get("coverage")
    return dict(found or {})


def describe(value: Mapping[str, Any]) -> str:
    """An input or output of the manifest as one word: `x: float32[s0,4]`; `cache: float32[8] (written)`."""
    kind = value["kind"]
    shown = f"{value['dtype']}[{','.join(map(str, value['shape']))}]" if kind == "tensor" else kind
    name, device = value.get("name"), value.get("device", "cpu")
    return (
        (f"{name}: " if name else "")
        + shown
        + ("" if device == "cpu" else f"@{device}")
        + " (written)" * bool(value.get("written"))
    )


def device_targets(manifest: Mapping[str, Any]) -> list[str]:
    """Targets of device kernels, such as `cuda:90`."""
    listed = manifest.get("device_kernels") or {}
    return sorted({entry["header"]["target"] for entries in listed.values() for entry in entries})


def count(plan: Plan, kind: type[Launch | Call]) -> int:
    """How many steps of a kind a plan and its regions have."""
    return sum(isinstance(s, kind) for s in plan.steps) + sum(count(region, kind) for _, region in plan.regions)


# -- the plan as text -------------------------------------------------------------------------------------------------


def plan_text(plan: Plan) -> str:
    """A plan for people: memory, then the steps in order, regions below."""
    return "\n".join(_plan_lines(plan, "plan")) + "\n"


def _plan_lines(plan: Plan, name: str) -> Iterator[str]:
    values = {v.id: v for v in plan.values}
    yield f"{name}: {len(plan.steps)} steps, arena of {size_text(plan.arena)} bytes"
    for guard, message in plan.asserts:
        yield f"  assert {size_text(guard)}  # {message}"
    for v in plan.values:
        if v.storage in ("arena", "fresh", "view"):
            yield f"  {_value(v)} {v.storage}{_place(v)}"
    for i, step in enumerate(plan.steps):
        if isinstance(step, Launch):
            sizes = "".join(f", {size_text(s)}" for s in step.sizes)
            yield f"  {i}: launch {step.kernel}({', '.join(f'v{b}' for b in step.buffers)}{sizes})"
        else:
            outs = ", ".join("_" if o is None else f"v{o}" for o in step.outs)
            args = [_argument(a) for a in step.args] + [f"{k}={_argument(a)}" for k, a in step.kwargs]
            where = f"  {step.origin}" if step.origin else ""
            yield f"  {i}: {outs} = {step.op}({', '.join(args)})  # {step.kind}: {step.reason}{where}"
    shown = [_value(values[o.ref]) if o.ref in values else f"{o.kind} {o.const if o.expr is None else size_text(o.expr)}"
             for o in plan.outputs]  # fmt: skip
    yield f"  return {', '.join(shown)}"
    for inner, region in plan.regions:
        yield from _plan_lines(region, f"region {inner}")


def _value(v: ValueSpec) -> str:
    return f"v{v.id}: {v.dtype}[{','.join(size_text(n) for n in v.shape)}]"


def _place(v: ValueSpec) -> str:
    of = f" of v{v.ref}" if v.storage == "view" else ""
    return of if v.storage == "fresh" else f"{of} at {size_text(v.offset)}"


def _argument(template: Any) -> str:
    ((kind, value),) = template.items()
    if kind == "v":
        return f"v{value}"
    if kind == "l":
        return f"[{', '.join(map(_argument, value))}]"
    return size_text(value) if kind == "e" else repr(value) if kind == "c" else str(value)


# -- comparing --------------------------------------------------------------------------------------------------------


def comparable(path: str | Path, level: str | None = None) -> dict[str, str]:
    """Texts by name that stand for a file in a comparison.

    An artifact gives its manifest without checksums, its graphs, plan and kernels (with `level`: that graph alone); any
    other file is its text. Raises NoSuchPart for a level that an artifact does not have.
    """
    if Path(path).read_bytes()[:4] != b"PK\3\4":
        return {"text": Path(path).read_text()}
    if level is not None:
        return {level: graph(path, level)}
    archive = Archive(path)
    manifest = {k: v for k, v in archive.manifest.items() if k != "members"}
    return {
        "manifest": json.dumps(manifest, indent=1, sort_keys=True),
        **{f"graph {name}": text for name, text in graphs(archive).items()},
        **{f"plan {target}": plan_text(plan_of(archive, target)) for target in plan_members(archive.manifest)},
        **{f"kernel {n.removeprefix(SOURCES)}": archive.text(n) for n in archive.names if n.startswith(SOURCES)},
        "weights": archive.manifest["members"][WEIGHTS]["sha256"],
        "binaries": "\n".join(n for n in archive.names if n.startswith(BINARIES)),
    }
