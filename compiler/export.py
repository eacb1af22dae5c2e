"""From modules and exported programs to graphs that own their weights."""

from __future__ import annotations

import copy
import inspect
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import GraphModule
from torch.fx import Node as FxNode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..errors import CannotExport, CannotImport, TrainingMode
from ..ir import Graph, Node, from_fx, op
from ..runtime.state import overlap
from .capture import outputs_to_writes
from .effects import make_tokens

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_GRAD_SPAN = "wrap_with_set_grad_enabled"
_CAST_SPAN = "wrap_with_autocast"


@dataclass(frozen=True)
class Exported:
    """A program as a functional graph before autograd, with its own copies of the weights as constants.

    `state` are buffers that the program writes, by name, a tied one under each of its names; the distinct ones, `held`, are
    the graph's first inputs, in order. `in_tree` is the structure of
    `(args, kwargs)`, whose leaves are the other inputs; `out_tree` that of the result. `examples` are the flat example
    inputs where there are any. `ones` names the size symbols for which the program was declared to hold at 1 too: torch
    traces every size as at least 2 and vouches for 1, so the graph's types say 2 and only the check of inputs says 1.
    """

    graph: Graph
    state: Mapping[str, torch.Tensor]
    in_tree: pytree.TreeSpec
    out_tree: pytree.TreeSpec
    examples: tuple[Any, ...] | None
    ones: frozenset[str] = frozenset()

    @property
    def held(self) -> list[torch.Tensor]:
        """The distinct buffers that the program writes."""
        return list({id(t): t for t in self.state.values()}.values())

    @property
    def inputs(self) -> list[Any] | None:
        """The flat inputs of the graph on the examples; None where there are no examples."""
        return None if self.examples is None else [*self.held, *self.examples]

    def copied(self) -> Exported:
        """The same with copies of the buffers that the program writes, tied as they were."""
        copies = {id(t): own(t) for t in self.held}
        return replace(self, state={name: copies[id(t)] for name, t in self.state.items()})


def export(model: Any, example_inputs: Any = None, dynamic_shapes: Any = None) -> ExportedProgram:
    """An exported program from a module, a function, a `.pt2` file, or itself.

    `example_inputs` are positional arguments (a tuple or list, or one tensor) or keyword arguments (a dict). Raises
    CannotExport in torch.export's words.
    """
    if isinstance(model, ExportedProgram):
        return model
    if isinstance(model, str | os.PathLike):
        return torch.export.load(os.fspath(model))
    what = type(model).__name__ if isinstance(model, torch.nn.Module) else getattr(model, "__name__", repr(model))
    if not callable(model):
        raise CannotExport(what=what, why="it is neither a module, a function nor an exported program")
    if example_inputs is None:
        raise CannotExport(what=what, why="there are no example inputs to capture it on")
    args, kwargs = as_arguments(example_inputs)
    module = model if isinstance(model, torch.nn.Module) else _Function(model)
    try:
        return torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:  # torch raises many classes here, from the model's code and from its own
        raise CannotExport(what=what, why=str(error) or type(error).__name__) from error


def capture_model(model: Any, example_inputs: Any = None, dynamic_shapes: Any = None, *, training: bool = False) -> Exported:
    """The graph of whatever `export` takes. A module in eval mode means what it says, training ops inside it included.

    Raises what `export` and `from_exported` raise.
    """
    deliberate = isinstance(model, torch.nn.Module) and not any(m.training for m in model.modules())
    return from_exported(export(model, example_inputs, dynamic_shapes), training=training or deliberate)


def name_of(model: Any) -> str:
    """What a model is called in logs and dumps."""
    return type(model).__name__ if isinstance(model, torch.nn.Module) else "model"


def as_arguments(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`(args, kwargs)` of example inputs: a dict is keywords, a tuple or list positions, anything else one position."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


def argument_names(model: Any) -> tuple[str, ...]:
    """What the arguments of a module, a function or an exported program are called; none where that is not known."""
    if isinstance(model, ExportedProgram):
        signature = model.module_call_graph[0].signature if model.module_call_graph else None
        return tuple((signature.forward_arg_names if signature is not None else None) or ())
    if not callable(model):
        return ()
    return tuple(inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model).parameters)


class _Function(torch.nn.Module):
    """A plain function as the module that torch.export wants, with the function's own parameter names."""

    def __init__(self, fn: Any) -> None:
        super().__init__()
        self.forward = fn


def own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with memory of its own and the same strides."""
    tensor = tensor.detach()
    copy = tensor.clone()
    if copy.stride() == tensor.stride():
        return copy
    memory = tensor.untyped_storage().clone()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())


def from_exported(program: ExportedProgram, *, training: bool = False) -> Exported:
    """The graph of an exported program. Equal parameters are one constant.

    Raises TrainingMode where an op draws its behaviour from training mode and `training` does not allow it, CannotImport.
    """
    if not training:
        _refuse_training(program)
    _inline_spans(program.graph_module)
    tensors = _tensors(program)
    program = _untied(program, tensors)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")  # torch copying its own tree specs
        functional = program.run_decompositions({})
    gm, signature = functional.graph_module, functional.graph_signature
    written = {str(s.target) for s in signature.output_specs if s.kind == OutputKind.BUFFER_MUTATION}
    weights, state = _weights(gm, signature, tensors, written)
    _write_outputs(gm, signature)
    imported = from_fx(gm, "forward")
    places = dict(zip((n.name for n in gm.graph.find_nodes(op="placeholder")), imported.inputs, strict=True))
    loads = [Node(op("plait.constant"), (target,), (places[name],)) for name, (target, _) in weights.items()]
    kept = [places[name] for name in state]
    constant = {n.out for n in loads}
    inputs = (*kept, *(v for v in imported.inputs if v not in constant and v not in kept))
    index = {v: i for i, v in enumerate(inputs)}
    graph = imported.replace(
        inputs=inputs,
        nodes=(*loads, *imported.nodes),
        writes=tuple(sorted(((index[imported.inputs[i]], v) for i, v in imported.writes), key=lambda w: w[0])),
        constants={**imported.constants, **dict(weights.values())},
    )
    spec = functional.call_spec
    example = program.example_inputs
    flat = tuple(pytree.tree_leaves(example)) if example is not None else None
    assert spec.in_spec is not None and spec.out_spec is not None
    ones = frozenset(s.name for s, allowed in functional.range_constraints.items() if allowed.lower <= 1)
    buffers = {name: tensor for names, tensor in state.values() for name in names}
    return Exported(graph, buffers, spec.in_spec, spec.out_spec, flat, ones)


def _refuse_training(program: ExportedProgram) -> None:
    for n in program.graph.nodes:
        schema = getattr(n.target, "_schema", None)
        names = [a.name for a in schema.arguments] if schema is not None else []
        given = dict(zip(names, n.args, strict=False)) | n.kwargs
        if any(given.get(name) is True for name in ("train", "training")) or given.get("dropout_p", 0.0) != 0.0:
            raise TrainingMode(op=n.target)


def _tensors(program: ExportedProgram) -> dict[str, Any]:
    """Parameters, buffers and other tensors of a program by name."""
    return {**program.constants, **program.state_dict}


def _identity(t: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same memory read the same way."""
    return (t.data_ptr(), t.dtype, t.shape, t.stride(), t.device) if t.numel() else (id(t),)


def _untied(program: ExportedProgram, tensors: Mapping[str, Any]) -> ExportedProgram:
    """The program with memory of its own for each buffer, tied ones used under one name: torch decomposes no program that
    writes to one of several buffers which share memory."""
    places = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    memories: set[int] = set()
    first: dict[Any, FxNode] = {}
    apart: dict[str, torch.Tensor] = {}
    for spec in program.graph_signature.input_specs:
        tensor = tensors.get(str(spec.target)) if spec.kind in _WEIGHTS else None
        if not isinstance(tensor, torch.Tensor) or not tensor.numel():
            continue
        memory = tensor.untyped_storage().data_ptr()
        if memory in memories and spec.kind == InputKind.BUFFER:
            apart[str(spec.target)] = own(tensor)
        memories.add(memory)
        place = places[spec.arg.name]
        keeper = first.setdefault(_identity(tensor), place)
        if keeper is not place:  # outputs are also named by the signature: `_weights` looks at those
            place.replace_all_uses_with(keeper, lambda user: user.op != "output")
    if not apart:
        return program
    program = copy.copy(program)
    program._state_dict = {name: apart.get(name, t) for name, t in program.state_dict.items()}
    program._constants = {name: apart.get(name, t) for name, t in program.constants.items()}
    return program


_ADDRESSING = (
    torch.ops.aten.as_strided.default,
    torch.ops.aten.as_strided_copy.default,
    torch.ops.aten.as_strided_scatter.default,
)


def _weights(
    gm: GraphModule, signature: Any, tensors: Mapping[str, Any], written: set[str]
) -> tuple[dict[str, tuple[str, torch.Tensor]], dict[str, tuple[list[str], torch.Tensor]]]:
    """(constants, state) by placeholder: the name of each tensor, or its names, and our copy. Tied ones become one
    placeholder. `tensors` are those of the program before `_untied`."""
    places = list(zip(gm.graph.find_nodes(op="placeholder"), signature.input_specs, strict=True))
    weights: dict[str, tuple[str, torch.Tensor]] = {}
    state: dict[str, tuple[list[str], torch.Tensor]] = {}
    seen: dict[Any, FxNode] = {}
    for n, spec in places:
        if str(spec.target) in written and spec.kind in _WEIGHTS:
            seen[_identity(tensors[str(spec.target)])] = n
            state[n.name] = ([], own(tensors[str(spec.target)]))
    for n, spec in places:
        if spec.kind == InputKind.USER_INPUT:
            continue
        if spec.kind == InputKind.TOKEN:
            make_tokens(gm, [n])
            continue
        if spec.kind not in _WEIGHTS:
            raise CannotImport(what=f"input {n.name}", why=f"it is a {spec.kind.name.lower()} of the program")
        name, tensor = str(spec.target), tensors[str(spec.target)]
        if not isinstance(tensor, torch.Tensor):
            raise CannotImport(what=f"weight {name}", why=f"it is a {type(tensor).__name__}")
        keeper = seen.setdefault(_identity(tensor), n)
        if keeper.name in state:
            state[keeper.name][0].append(name)
        if tensor.storage_offset() and any(m.target in _ADDRESSING for m in gm.graph.nodes):
            why = "the graph uses as_strided, which counts from where memory begins, and the weight begins after it"
            raise CannotImport(what=f"weight {name}", why=why)
        _refuse_overlap(name, n, tensor, {w: tensors[w] for w in written}, keeper)
        if keeper is not n:
            n.replace_all_uses_with(keeper)
            gm.graph.erase_node(n)
        elif n.name not in state:
            weights[n.name] = (name, own(tensor))
    return weights, state


def _refuse_overlap(name: str, place: FxNode, tensor: torch.Tensor, written: Mapping[str, Any], keeper: FxNode) -> None:
    """Raise CannotImport for a tensor whose use would not show what the program writes to another one."""
    tied = keeper is not place and not any(user.op == "output" for user in place.users)
    for other, t in written.items():
        same_memory = t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        if other != name and same_memory and place.users and overlap(t, tensor) and not tied:
            raise CannotImport(what=f"buffer {name}", why=f"it shares memory with {other}, which the model writes")


def _write_outputs(gm: GraphModule, signature: Any) -> None:
    """Outputs that are new values of buffers and inputs become writes of their placeholders; effect tokens are dropped."""
    nodes = {n.name: n for n in gm.graph.nodes}
    buffers = {s.target: nodes.get(s.arg.name) for s in signature.input_specs if s.kind == InputKind.BUFFER}
    writes: list[tuple[FxNode, FxNode]] = []
    results: list[Any] = []
    outputs: Any = gm.graph.output_node().args[0]
    for spec, value in zip(signature.output_specs, outputs, strict=True):
        if spec.kind == OutputKind.USER_OUTPUT:
            results.append(spec.arg.value if isinstance(spec.arg, ConstantArgument) else value)
            continue
        if spec.kind == OutputKind.TOKEN:
            continue
        targets = {OutputKind.BUFFER_MUTATION: buffers, OutputKind.USER_INPUT_MUTATION: nodes}.get(spec.kind)
        if targets is None:
            raise CannotImport(what=f"output {value}", why=f"it is a {spec.kind.name.lower()} of the program")
        writes.append((targets[spec.target], value))
    outputs_to_writes(gm, writes, results)


# -- spans of no_grad and autocast ------------------------------------------------------------------------------------


def _inline_spans(gm: GraphModule) -> None:
    """Inline what torch.export keeps as a call of a submodule: no_grad means nothing here, autocast becomes casts."""
    for n in list(gm.graph.nodes):
        name = n.target.name() if isinstance(n.target, torch._ops.HigherOrderOperator) else ""
        if name == _GRAD_SPAN:
            _, body, *args = n.args
            _inline(gm, n, getattr(gm, body.target), args)
        elif name == _CAST_SPAN:
            device, dtype, enabled, cache, body, *args = n.args
            inner = getattr(gm, body.target)
            if enabled:
                cast = torch.autocast(device, dtype=dtype, enabled=True, cache_enabled=cache)
                inner = _with_casts(inner, cast, [a.meta["val"] if isinstance(a, FxNode) else a for a in args])
            _inline(gm, n, inner, args)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _with_casts(body: GraphModule, cast: Any, inputs: Sequence[Any]) -> GraphModule:
    """The span traced below autocast, so that its casts are ops of the graph."""
    mode = next((t.fake_mode for t in inputs if hasattr(t, "fake_mode")), None)
    if mode is None:
        raise CannotImport(what="an autocast span", why="it has no tensor inputs")

    def run(*args: Any) -> Any:
        with cast:
            return body(*args)

    with mode, torch.no_grad():
        return make_fx(run)(*inputs)


def _inline(gm: GraphModule, call: FxNode, body: GraphModule, args: Sequence[Any]) -> None:
    """Replace a call of a submodule that returns a tuple by the submodule's nodes."""
    _inline_spans(body)
    env: dict[FxNode, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), args, strict=True))
    with gm.graph.inserting_before(call):
        for n in body.graph.nodes:
            if n.op == "get_attr":
                name = f"_span_{n.target}".replace(".", "_")
                while hasattr(gm, name):
                    name += "_"
                setattr(gm, name, getattr(body, str(n.target)))
                env[n] = gm.graph.get_attr(name)
                env[n].meta = dict(n.meta)
            elif n.op == "call_function":
                env[n] = gm.graph.node_copy(n, lambda a: env[a])
            elif n.op not in ("placeholder", "output"):
                raise CannotImport(what=f"fx node {n.op}", why="spans of exported programs hold calls of ops only")
    results = pytree.tree_map_only(FxNode, lambda a: env[a], body.graph.output_node().args[0])
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)
