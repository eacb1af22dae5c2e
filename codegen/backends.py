"""What differs between kinds of devices once a graph is scheduled: how kernels are printed, and how they are loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..runtime.plan import KernelSpec, Plan
from .cpp.printer import print_kernel as print_cpp
from .items import Item, KernelItem, Scheduled
from .kernels import current_cache, load_kernels
from .target import Target
from .triton.build import load as load_triton
from .triton.printer import print_kernel as print_triton
from .triton.source import TritonSource


@dataclass(frozen=True)
class Printed:
    """A launch of a printed function: what the plan says of it, and its text."""

    item: KernelItem
    spec: KernelSpec
    text: str


@dataclass(frozen=True)
class Backend:
    """`print` gives the launches, in order, that a kernel item becomes; `load` makes the kernels of a plan callable on
    a device, for the executor: (plan, texts by kernel name, target, device, instruction set)."""

    print: Callable[[KernelItem], Iterator[Printed]]
    load: Callable[[Plan, Mapping[str, str], Target, str, str], dict[str, Any]]


def _cpp(item: KernelItem) -> Iterator[Printed]:
    text = item.source if isinstance(item.source, str) else print_cpp(_tree(item))
    yield Printed(item, KernelSpec(item.name, "cpp", hashlib.sha256(text.encode()).hexdigest()[:16], item.access), text)


def _load_cpp(plan: Plan, sources: Mapping[str, str], target: Target, device: str, isa: str) -> dict[str, Any]:
    return load_kernels(sources, current_cache(), isa)


def _triton(item: KernelItem) -> Iterator[Printed]:
    """One launch for each nest. What the kernel as a whole only writes, its first nest that touches it only writes too."""
    if isinstance(item.source, TritonSource):
        yield Printed(item, item.source.spec(item.access), item.source.text)
        return
    kernel = _tree(item)
    bound = dict(zip((b.name for b in kernel.buffers), zip(item.buffers, item.access, strict=True), strict=True))
    sizes = dict(zip((s.name for s in kernel.sizes), item.sizes, strict=True))
    touched: set[str] = set()
    for source in print_triton(kernel):
        access = tuple(_access(b.name, b.access, bound[b.name][1], b.name in touched) for b in source.buffers)
        touched.update(b.name for b in source.buffers)
        values = tuple(bound[b.name][0] for b in source.buffers)
        launch = KernelItem(source.name, values, access, tuple(sizes[s] for s in source.sizes), item.nodes, kernel)
        yield Printed(launch, source.spec(access), source.text)


def _access(name: str, nest: str, whole: str, touched: bool) -> str:
    """What a launch does with a buffer: a nest's own access, but for what the whole kernel alone writes or overwrites."""
    if whole == "write" and not touched:
        return "write"
    return whole if whole == "read_write" and nest == "write" else nest


def _load_triton(plan: Plan, sources: Mapping[str, str], target: Target, device: str, isa: str) -> dict[str, Any]:
    return load_triton(plan, sources, target.name, device, current_cache())


def _tree(item: KernelItem) -> Any:
    assert item.kernel is not None, f"kernel {item.name} has neither source nor tree"
    return item.kernel


BACKENDS = {"cpu": Backend(_cpp, _load_cpp), "cuda": Backend(_triton, _load_triton)}
"""By kind of device."""


@dataclass(frozen=True)
class PrintedGraph:
    """A scheduled graph whose items are launches of printed functions, with their specs and texts by name."""

    scheduled: Scheduled
    specs: Mapping[str, KernelSpec]
    sources: Mapping[str, str]


def print_graph_kernels(scheduled: Scheduled, target: Target) -> PrintedGraph:
    """Print every kernel of a scheduled graph in the target's language. Equal kernels are one function."""
    items: list[Item] = []
    specs: dict[str, KernelSpec] = {}
    sources: dict[str, str] = {}
    for item in scheduled.items:
        if not isinstance(item, KernelItem):
            items.append(item)
            continue
        for printed in BACKENDS[target.kind].print(item):
            items.append(printed.item)
            specs.setdefault(printed.spec.name, printed.spec)
            sources.setdefault(printed.spec.name, printed.text)
    return PrintedGraph(replace(scheduled, items=tuple(items)), specs, sources)
