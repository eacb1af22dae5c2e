"""Capture: from what torch hands over to graphs, and back.

`forward` is functional ATen before autograd, for passes that change what is computed: the result goes back into torch,
which differentiates it. `joint` is forward and backward in one graph, as AOTAutograd's partitioner sees it. What is
compiled (a forward, a backward, an inference graph) is imported by `ir.from_fx` as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._functorch._aot_autograd.functional_utils import from_fun, to_fun
from torch._functorch.aot_autograd import aot_export_module
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx import GraphModule, Interpreter
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.fx.node import map_arg
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from ..errors import CannotCapture, NeedsSizeFact, PlaitError
from ..ir import Arg, Graph, Node, TensorType, Value, from_fx
from ..ir.fake import FakeWorld
from ..ir.fx import FxLinks, to_fx
from .effects import make_tokens, refuse_in_regions, rethread

aten: Any = torch.ops.aten

Decompositions = Mapping[Any, Callable[..., Any]]

#: Control flow that keeps its meaning before autograd; every other higher-order op brings its own or loses it there.
_REGION_OPS = ("cond", "while_loop", "scan", "invoke_subgraph")


@contextmanager
def real_tensors() -> Iterator[None]:
    """Compilation handles real weights and runs real kernels while torch may be tracing with fake tensors around it."""
    with unset_fake_temporarily():
        yield


# -- before autograd --------------------------------------------------------------------------------------------------


class _Probe(Interpreter):
    """Runs a graph on fake tensors and looks for what a functional graph before autograd would silently lose."""

    def run_node(self, n: FxNode) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        watched = [(t, t._version) for t in _tensors((args, kwargs))] if n.op.startswith("call") else []
        result = super().run_node(n)
        for t, version in watched:
            if t._version == version:
                continue
            if t.requires_grad and not torch.is_grad_enabled():
                # eager keeps the gradient of the old value; a functional graph would cut it
                raise CannotCapture(why=f"{n.name} changes a value that carries gradients while no_grad holds")
            self.written.add(t.untyped_storage()._cdata)
        return result

    def check(self, inputs: Sequence[Any]) -> None:
        self.written: set[int] = set()
        mine = {t.untyped_storage()._cdata for t in _tensors(inputs)}
        for t in _tensors(self.run(*inputs)):
            if t.untyped_storage()._cdata in mine & self.written:
                raise CannotCapture(why="an output is a view of an input that the program writes to")


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _refuse_unknown(gm: GraphModule) -> None:
    """Raise CannotCapture for what loses its meaning when it is traced before autograd."""
    if torch._C._is_any_autocast_enabled():
        raise CannotCapture(why="autocast is on, and its casts are only known after autograd")
    if next(gm.named_parameters(), None) is not None:
        raise CannotCapture(why="the graph holds parameters of its own")
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        for n in module.graph.nodes:
            name = n.target.name() if isinstance(n.target, HigherOrderOperator) else None
            if name is not None and name not in _REGION_OPS:
                raise CannotCapture(why=f"{name} has its own rule of differentiation")
            if getattr(n.target, "__name__", "") == "_enter_autocast":
                raise CannotCapture(why="it switches autocast on, and its casts are only known after autograd")


def _probe_inputs(gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Fake stand-ins for the inputs, fresh, so that probing leaves no trace on Dynamo's own."""
    found: list[Any] = []
    for n, given in zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True):
        fake = n.meta.get("example_value", given)
        if isinstance(fake, torch.Tensor):
            if not isinstance(fake, FakeTensor):
                raise CannotCapture(why=f"input {n.name} came without a fake tensor")
            with fake.fake_mode:
                leaf = torch.empty_strided(fake.size(), fake.stride(), dtype=fake.dtype, device=fake.device)
                leaf.requires_grad_(fake.requires_grad)
                fake = leaf if fake.is_leaf else leaf.clone()
        found.append(fake)
    return found


def _probe(gm: GraphModule, inputs: Sequence[Any]) -> None:
    fakes = _probe_inputs(gm, inputs)
    mode = next((t.fake_mode for t in _tensors(fakes) if isinstance(t, FakeTensor)), None)
    if mode is None:
        return
    with _on_fakes(mode):
        _Probe(gm).check(fakes)


@contextmanager
def _on_fakes(mode: FakeTensorMode) -> Iterator[None]:
    """Run a program on fake tensors, leaving no trace: gradient mode and symbols stay as they are."""
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        stack.enter_context(mode)
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        yield


def capture_forward(gm: GraphModule, inputs: Sequence[Any]) -> Graph:
    """The functional graph of a Dynamo graph before autograd, on the same flat inputs.

    Values that leave a no_grad span are detached; mutation of inputs becomes `writes`. Raises CannotCapture where torch
    cannot trace the graph so, or where gradients would come out different.
    """
    _refuse_unknown(gm)
    try:
        _probe(gm, inputs)
        traced: Any
        traced, signature = aot_export_module(gm, inputs, trace_joint=False, pre_dispatch=True)
        _write_back(traced, signature)
        _detach_spans(traced)
        _differentiable_copies(traced)
        return from_fx(traced, "forward")
    except PlaitError:
        raise
    except Exception as error:  # tracing raises many classes; all mean that this graph has no functional form
        raise CannotCapture(why=str(error).split("\n")[0] or type(error).__name__) from error


def _write_back(gm: GraphModule, signature: Any) -> None:
    """The leading outputs that are new values of inputs, as `copy_` before the output."""
    writes = {**signature.user_inputs_to_mutate, **signature.buffers_to_mutate}
    results: Any = gm.graph.output_node().args[0]
    results = results[len(signature.output_tokens) :]
    make_tokens(gm, [n for n in gm.graph.find_nodes(op="placeholder") if n.name in signature.input_tokens])
    count = len(results) - len(signature.user_outputs)
    if count != len(writes) or signature.buffers or signature.parameters:
        raise CannotCapture(why="two inputs get the same new value, or the graph holds state of its own")
    places = {n.name: n for n in gm.graph.find_nodes(op="placeholder")}
    outputs_to_writes(gm, [(places[writes[v.name]], v) for v in results[:count]], results[count:])


def outputs_to_writes(gm: GraphModule, writes: Sequence[tuple[FxNode, FxNode]], outputs: Sequence[Any]) -> None:
    """Let the graph write values onto placeholders at its end, and return `outputs`."""
    output = gm.graph.output_node()
    with gm.graph.inserting_before(output):
        for target, value in writes:
            gm.graph.call_function(aten.copy_.default, (target, value)).meta["val"] = target.meta["val"]
    output.args = (tuple(outputs),)
    gm.recompile()


def _detach_spans(gm: GraphModule) -> None:
    """Drop the markers of no_grad spans and detach the values that leave them."""
    enabled = torch.is_grad_enabled()
    cut = enabled  # without gradients around, nothing is to be cut
    inside: dict[FxNode, bool] = {}
    for n in list(gm.graph.nodes):
        if n.target is torch._C._set_grad_enabled:
            enabled = bool(n.args[0])
            gm.graph.erase_node(n)
            continue
        tuple_part = n.op == "call_function" and getattr(n.target, "__name__", "") == "getitem"
        inside[n] = inside[n.args[0]] if tuple_part else not enabled and n.op == "call_function"  # type: ignore[index]
    for n in [n for n, quiet in inside.items() if cut and quiet and isinstance(n.meta.get("val"), torch.Tensor)]:
        outside = [u for u in n.users if not inside.get(u, False)]
        if outside and (n.meta["val"].is_floating_point() or n.meta["val"].is_complex()):
            with gm.graph.inserting_after(n):
                quiet = gm.graph.call_function(aten.detach.default, (n,))
            quiet.meta.update(n.meta)
            for u in outside:
                u.replace_input_with(n, quiet)
    gm.recompile()


def _differentiable_copies(gm: GraphModule) -> None:
    """Functional `copy(old, new)` has no derivative in torch; it is `new`, cast and broadcast to the type of `old`."""
    for n in gm.graph.find_nodes(op="call_function", target=aten.copy.default):
        old, new = n.args[0].meta["val"], n.args[1].meta["val"]
        with gm.graph.inserting_before(n), n.meta["val"].fake_mode, torch.no_grad():
            value = n.args[1]
            if (old.dtype, old.device) != (new.dtype, new.device):
                value = gm.graph.call_function(aten._to_copy.default, (value,), {"dtype": old.dtype, "device": old.device})
                value.meta.update({**n.meta, "val": aten._to_copy.default(new, dtype=old.dtype, device=old.device)})
            sizes = [_size_node(gm, n.args[0], i, s) for i, s in enumerate(old.shape)]
            spread = gm.graph.call_function(aten.expand.default, (value, sizes))
            spread.meta.update({**n.meta, "val": aten.expand.default(value.meta["val"], list(old.shape))})
        n.replace_all_uses_with(spread)
        gm.graph.erase_node(n)
    gm.recompile()


def _size_node(gm: GraphModule, of: FxNode, i: int, size: Any) -> Any:
    if isinstance(size, int):
        return size
    node = gm.graph.call_function(aten.sym_size.int, (of, i))
    node.meta["val"] = size
    return node


def restore_forward(graph: Graph, gm: GraphModule, inputs: Sequence[Any]) -> GraphModule:
    """The graph as a module that takes the place of the Dynamo graph it was captured from.

    Raises CannotCapture where an op on the way of gradients has no derivative.
    """
    made = to_fx(graph)
    for new, old in zip(made.graph.find_nodes(op="placeholder"), gm.graph.find_nodes(op="placeholder"), strict=True):
        new.meta.update(old.meta)
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]  # AOTAutograd's guards speak of it
    made.meta.update(gm.meta)
    if hasattr(gm, "_param_name_to_source"):  # AOTAutograd says what inputs are parameters only where this is there
        names = [name for name, _ in (*made.named_parameters(), *made.named_buffers())]
        made._param_name_to_source = {name: ConstantSource(f"plait_{name}") for name in names}  # type: ignore[assignment]
    if torch.is_grad_enabled():
        _keep_old_values(made)
        _check_derivatives(made, inputs)
    return made


def _keep_old_values(gm: GraphModule) -> None:
    """Let the program read copies of the inputs that it writes at its end: autograd may have saved them for backward."""
    for write in gm.graph.find_nodes(op="call_function", target=aten.copy_.default):
        target = write.args[0]
        with gm.graph.inserting_after(target):
            copy = gm.graph.call_function(aten.clone.default, (target,))
        target.replace_all_uses_with(copy, lambda user: user is not copy and user is not write)  # noqa: B023
    gm.recompile()


class _DerivativeCheck(Interpreter):
    def __init__(self, gm: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode

    def fetch_attr(self, target: str) -> Any:
        found = super().fetch_attr(target)  # a constant that a pass brought in
        return self.mode.from_tensor(found) if isinstance(found, torch.Tensor) else found

    def run_node(self, n: FxNode) -> Any:
        result = super().run_node(n)
        for t in _tensors(result):
            if t.grad_fn is not None and t.grad_fn.name() == "torch::autograd::NotImplemented":
                raise CannotCapture(why=f"{n.target} has no derivative")
        return result


def _check_derivatives(gm: GraphModule, inputs: Sequence[Any]) -> None:
    fakes = _probe_inputs(gm, inputs)
    mode = next((t.fake_mode for t in _tensors(fakes) if isinstance(t, FakeTensor)), None)
    if mode is not None:
        with _on_fakes(mode):
            _DerivativeCheck(gm, mode).run(*fakes)


# -- forward and backward in one ----------------------------------------------------------------------------------------


def capture_joint(gm: GraphModule) -> tuple[Graph, FxLinks]:
    """The joint graph, and which fx node each value came from. Raises CannotImport."""
    links = FxLinks()
    refuse_in_regions(gm)
    return from_fx(gm, "joint", links), links


def restore_joint(graph: Graph, links: FxLinks, gm: GraphModule) -> GraphModule:
    """The joint graph as fx again, with the metadata that torch's partitioner reads.

    Nodes that survived keep theirs (recomputation tags, places in forward or backward); new nodes are typed anew.
    """
    here = FxLinks()
    made = to_fx(graph, here)
    came: dict[FxNode, FxNode] = {}
    for mine, theirs in ((here.calls, links.calls), (here.values, links.values), (here.writes, links.writes)):
        old = {v: n for n, v in theirs.items()}
        came.update({n: old[v] for n, v in mine.items() if v in old})
    came[made.graph.output_node()] = gm.graph.output_node()
    came.update(rethread(made, came, gm))
    mode = detect_fake_mode([n.meta.get("val") for n in gm.graph.find_nodes(op="placeholder")])
    modules = [m for m in made.modules() if isinstance(m, GraphModule)]
    for module in reversed(modules):  # regions first
        for n in module.graph.nodes:
            if n in came:
                n.meta = dict(came[n].meta)
            elif n.op == "call_function":
                args, kwargs = map_arg((n.args, n.kwargs), lambda a: _value(module, a))  # noqa: B023
                with mode or real_tensors(), torch.no_grad():
                    n.meta["val"] = n.target(*args, **kwargs)  # type: ignore[operator]
    return made


def _value(gm: GraphModule, n: FxNode) -> Any:
    return n.meta["val"] if "val" in n.meta else getattr(gm, str(n.target))


# -- lowering -----------------------------------------------------------------------------------------------------------


_CONVOLUTIONS = frozenset(
    ("convolution", "_convolution", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
)


class _Lowering(Interpreter):
    """Runs a graph in a world of fake tensors. What a convolution asks about sizes there only chooses the library that
    computes it, which torch does again at run time: those questions assume nothing."""

    def __init__(self, gm: GraphModule, world: FakeWorld, enter: Callable[[FxNode], None]) -> None:
        super().__init__(gm)
        self.world = world
        self.enter = enter
        self.traced: dict[FxNode, FxNode] = {}  # where the trace holds what each node gives

    def run_node(self, n: FxNode) -> Any:
        self.enter(n)
        result = self.run_unguarded(n)
        mode = get_proxy_mode()
        if mode is not None and isinstance(result, torch.Tensor):
            inner: Any = from_fun(result)
            slot: Any = get_proxy_slot(inner, mode.tracer, None)
            if slot is not None:
                self.traced[n] = slot.proxy.node
        return result

    def run_unguarded(self, n: FxNode) -> Any:
        if str(n.target).partition(".")[2].partition(".")[0] in _CONVOLUTIONS:
            with self.world.env.suppress_guards():
                return super().run_node(n)
        return super().run_node(n)


@dataclass
class Place:
    """Where a lowering is: the node that is traced now."""

    node: Node | None = None


def lower(
    graph: Graph,
    decompositions: Decompositions,
    name: str = "",
    replaced: dict[Value, Arg] | None = None,
    place: Place | None = None,
) -> Graph:
    """The graph traced again below autograd: composite ops and those of the table are replaced by their parts.

    `replaced` is filled with the new value of each old one, `place` is kept at the node that is traced. Raises NeedsSizeFact
    where a decomposition would hold for some sizes only.
    """
    constants = [n for n in graph.nodes if n.op.name == "plait.constant"]
    lifted = graph.replace(
        inputs=(*graph.inputs, *(n.out for n in constants)),
        nodes=tuple(n for n in graph.nodes if n.op.name != "plait.constant"),
        outputs=(*graph.outputs, *(v for _, v in graph.writes)),
        writes=(),
        constants={},
    )
    links = FxLinks()
    gm = to_fx(lifted, links)
    for n, value in links.calls.items():
        if value in graph.producers and (module := graph.producers[value].loc.module):
            n.meta["nn_module_stack"] = {module: (module, "")}
    used = {s for v in lifted.inputs for s in _symbols(v)}
    world = FakeWorld({s: info for s, info in graph.symbols.items() if s in used})
    fakes = [world.lift(v.type) for v in lifted.inputs]

    at = place or Place()

    def enter(n: FxNode) -> None:
        at.node = graph.producers.get(links.calls[n]) if n in links.calls else None

    lowering = _Lowering(gm, world, enter)

    def run(*args: Any) -> Any:
        with preserve_node_meta():
            return lowering.run(*args)

    def trace(run: Callable[..., Any]) -> GraphModule:
        try:
            with world.mode, torch.no_grad():
                return make_fx(run, decomposition_table=dict(decompositions), _allow_non_fake_inputs=True)(*fakes)
        except GuardOnDataDependentSymNode as error:
            asking = at.node.op.name if at.node is not None else "a decomposition"
            raise NeedsSizeFact(op=asking, fact=error.cond) from error

    traced = trace(run)
    if _writes_in_place(traced):  # composites of torch, such as gru, that reuse memory where no gradient is asked for
        traced = trace(_functional(run))
    if world.assumed():
        raise NeedsSizeFact(op="a decomposition", fact=world.assumed())
    places = traced.graph.find_nodes(op="placeholder")
    for n, v in zip(places, lifted.inputs, strict=True):
        n._rename(v.hint or "x")
    results: Any = traced.graph.output_node().args[0]
    written = [(places[i], v) for (i, _), v in zip(graph.writes, results[len(graph.outputs) :], strict=True)]
    outputs_to_writes(traced, written, results[: len(graph.outputs)])
    here = FxLinks()
    done = from_fx(traced, name or graph.name, here)
    if replaced is not None:
        pairs = ((old, here.values.get(lowering.traced.get(n, n))) for n, old in links.values.items())
        replaced.update({old: new for old, new in pairs if new is not None and new.type == old.type})
    count = len(graph.inputs)
    loads = tuple(Node(n.op, n.args, (v,), loc=n.loc) for v, n in zip(done.inputs[count:], constants, strict=True))
    return done.replace(
        inputs=done.inputs[:count], nodes=(*loads, *done.nodes), constants={**done.constants, **graph.constants}
    )


def _functional(run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` with writes to memory replaced by new values. Tracing this way takes longer."""

    def functional(*args: Any) -> Any:
        with FunctionalTensorMode():
            return pytree.tree_map(from_fun, run(*pytree.tree_map(to_fun, args)))

    return functional


def _writes_in_place(gm: GraphModule) -> bool:
    schemas = (getattr(n.target, "_schema", None) for n in gm.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _symbols(value: Value) -> frozenset[Any]:
    if isinstance(value.type, TensorType):
        return value.type.symbols()
    expr = getattr(value.type, "expr", None)
    return frozenset() if expr is None else frozenset(expr.free_symbols)
