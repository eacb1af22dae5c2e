"""Random draws that a recomputation must repeat: torch's wrappers around an op, unfolded into ops on the generator's state.

Where a checkpointed region draws random numbers, torch's partitioner leaves `run_and_save_rng_state(op, ...)` in the
forward and `run_with_rng_state(state, op, ...)` in the backward. Here they become

    before:  state, y = run_and_save_rng_state(bernoulli, x)     after:  state = get_rng_state("cpu"); y = bernoulli(x)
    before:  y = run_with_rng_state(state, bernoulli, x)         after:  old = swap_rng_state(state, "cpu")
                                                                         y = bernoulli(x); swap_rng_state(old, "cpu")

All of these have the effect `random`, so that their order is fixed.
"""

from __future__ import annotations

import operator
from contextlib import nullcontext
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._prims.rng_prims import get_device, run_and_save_rng_state, run_with_rng_state
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from ..errors import CannotImport

_library = torch.library.Library("plait", "FRAGMENT")
_library.define("get_rng_state(str generator) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
_library.define("swap_rng_state(Tensor state, str generator) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))


def get_rng_state(generator: str) -> torch.Tensor:
    """A copy of the state of the default generator of "cpu" or "cuda", uint8 on the CPU."""
    return torch.get_rng_state() if generator == "cpu" else torch.cuda.get_rng_state()


def swap_rng_state(state: torch.Tensor, generator: str) -> torch.Tensor:
    """Set the state of the default generator; the state before."""
    before = get_rng_state(generator)
    if generator == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state.cpu())
    return before


_library.impl("get_rng_state", get_rng_state, "CompositeExplicitAutograd")
_library.impl("swap_rng_state", swap_rng_state, "CompositeExplicitAutograd")


@torch.library.register_fake("plait::get_rng_state", lib=_library)
def _fake_get(generator: str) -> torch.Tensor:
    return torch.empty(get_rng_state(generator).shape, dtype=torch.uint8)


@torch.library.register_fake("plait::swap_rng_state", lib=_library)
def _fake_swap(state: torch.Tensor, generator: str) -> torch.Tensor:
    return torch.empty_like(state)


def unfold(gm: GraphModule) -> GraphModule:
    """Replace torch's wrappers in place; returns the graph. Raises CannotImport for devices other than CPU and CUDA."""
    changed = False
    for n in list(gm.graph.nodes):
        if n.target is run_and_save_rng_state:
            _unfold_save(gm, n)
        elif n.target is run_with_rng_state:
            _unfold_repeat(gm, n)
        else:
            continue
        gm.graph.erase_node(n)
        changed = True
    if changed:
        gm.recompile()
    return gm


def _device(n: FxNode, args: tuple[Any, ...]) -> str:
    found = get_device([a.meta["val"] if isinstance(a, FxNode) else a for a in args], n.kwargs)
    if found not in ("cpu", "cuda"):
        raise CannotImport(what=f"a repeated random draw on {found}", why="only generators of cpu and cuda are known")
    return found


def _fake_state(n: Any, device: str) -> torch.Tensor:
    """A generator's state has one size; torch gives its fake a size symbol that nothing binds."""
    with n.meta["val"].fake_mode:
        return torch.empty(len(get_rng_state(device)), dtype=torch.uint8)


def _fake_result(n: FxNode, target: Any, args: Any) -> Any:
    """What the wrapped op gives: torch leaves the wrapper in the backward without types."""
    given = [a.meta["val"] if isinstance(a, FxNode) else a for a in args]
    kwargs = {k: a.meta["val"] if isinstance(a, FxNode) else a for k, a in n.kwargs.items()}
    with detect_fake_mode(given) or nullcontext(), torch.no_grad():
        return target(*given, **kwargs)


def _call(gm: GraphModule, like: FxNode, target: Any, args: Any, val: Any, **kwargs: Any) -> FxNode:
    made = gm.graph.call_function(target, tuple(args), kwargs)
    made.meta = {**like.meta, "val": val}
    return made


def _unfold_save(gm: GraphModule, n: FxNode) -> None:
    target, *args = n.args
    device = _device(n, tuple(args))
    parts: dict[Any, FxNode] = {u.args[1]: u for u in n.users if u.target is operator.getitem}  # the types lie on these
    if set(parts) != {0, 1} or len(parts) != len(n.users):
        raise CannotImport(what="run_and_save_rng_state", why="its results are used as one value")
    with gm.graph.inserting_before(n):
        state = _call(gm, n, torch.ops.plait.get_rng_state.default, (device,), _fake_state(parts[0], device))
        out = _call(gm, n, target, args, parts[1].meta["val"], **n.kwargs)
    for i, made in enumerate((state, out)):
        parts[i].replace_all_uses_with(made)
        gm.graph.erase_node(parts[i])


def _unfold_repeat(gm: GraphModule, n: FxNode) -> None:
    state, target, *args = n.args
    device = _device(n, tuple(args))
    val = state.meta["val"] = _fake_state(state, device)  # type: ignore[union-attr]
    swap = torch.ops.plait.swap_rng_state.default
    with gm.graph.inserting_before(n):
        before = _call(gm, n, swap, (state, device), val)
        out = _call(gm, n, target, args, _fake_result(n, target, args), **n.kwargs)
        _call(gm, n, swap, (before, device), val)
    n.replace_all_uses_with(out)
