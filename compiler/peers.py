"""What `plait bench` compares plait with: eager, Inductor, OpenVINO and ONNX Runtime, each on the CPU in its own best way.

All take the same arguments, run on torch's number of threads and compute in float32 where the model does.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..errors import MissingPackage, PeerRefused, UnknownPeer
from .export import export

_INSTALL = "pip install 'plait[peers]', in a checkout: pip install -c constraints.txt -e '.[peers]'"


@dataclass(frozen=True)
class Task:
    """A model as its peers get it: a callable, the arguments of a call, torch.export's dynamic shapes, threads."""

    model: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    dynamic_shapes: Any = None
    threads: int = field(default_factory=torch.get_num_threads)

    @property
    def eager(self) -> Callable[..., Any]:
        """The model as a callable that runs without plait."""
        return self.model.module() if isinstance(self.model, torch.export.ExportedProgram) else self.model

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors among the arguments, in the order of an exported program's inputs."""
        return [x for x in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, torch.Tensor)]

    def exported(self) -> torch.export.ExportedProgram:
        """The model through torch.export."""
        return export(self.model, dict(self.kwargs) if self.kwargs else self.args, self.dynamic_shapes)


@dataclass(frozen=True)
class Peer:
    """Something to compare with. `make` compiles a task; the call that it gives back takes no arguments and returns flat
    results. `settings` says how it is used, `packages` what must be installed."""

    name: str
    settings: str
    make: Callable[[Task], Callable[[], Sequence[Any]]]
    packages: tuple[str, ...] = ()

    def ready(self, task: Task) -> Callable[[], Sequence[Any]]:
        """`make`, and what goes wrong there in the catalogue's words. Raises PeerRefused."""
        try:
            return self.make(task)
        except Exception as error:  # each library has classes of its own
            raise PeerRefused(peer=self.name, why=f"{type(error).__name__}: {error}") from error


def chosen(names: Iterable[str]) -> list[Peer]:
    """The peers of these names. Raises UnknownPeer, and MissingPackage for one that is not installed."""
    found: list[Peer] = []
    for name in dict.fromkeys(names):
        if name not in PEERS:
            raise UnknownPeer(name=name, known=", ".join(PEERS))
        missing = [p for p in PEERS[name].packages if find_spec(p) is None]
        if missing:
            raise MissingPackage(what=f"the peer {name}", package=missing[0], how=_INSTALL)
        found.append(PEERS[name])
    return found


def _eager(task: Task) -> Callable[[], Sequence[Any]]:
    eager = task.eager
    return lambda: pytree.tree_leaves(eager(*task.args, **task.kwargs))


def _inductor(task: Task) -> Callable[[], Sequence[Any]]:
    from torch._inductor.utils import fresh_cache

    compiled = torch.compile(task.eager, dynamic=bool(task.dynamic_shapes))
    with fresh_cache():
        compiled(*task.args, **task.kwargs)
    return lambda: pytree.tree_leaves(compiled(*task.args, **task.kwargs))


def _openvino(task: Task) -> Callable[[], Sequence[Any]]:
    openvino: Any = importlib.import_module("openvino")
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(task.threads),
    }
    compiled = openvino.Core().compile_model(openvino.convert_model(task.exported()), "CPU", settings)
    arrays = [x.detach().numpy() for x in task.tensors]

    def call() -> list[torch.Tensor]:
        found = compiled(arrays, share_inputs=True, share_outputs=True)
        return [torch.from_numpy(found[i]) for i in range(len(compiled.outputs))]

    return call


def _onnxruntime(task: Task) -> Callable[[], Sequence[Any]]:
    onnxruntime: Any = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
    options.log_severity_level = 3
    # threads spin while they wait within a run, but not on into what runs after it
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory(prefix="plait-onnx-") as folder:
        path = Path(folder, "model.onnx")
        program: Any = torch.onnx.export(task.exported(), dynamo=True, verbose=False)
        program.save(path)
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]
    feeds = dict(zip(names, (x.detach().numpy() for x in task.tensors), strict=True))
    return lambda: [torch.from_numpy(x) for x in session.run(None, feeds)]


PEERS: Mapping[str, Peer] = {
    p.name: p
    for p in (
        Peer("eager", "as it is", _eager),
        Peer("inductor", "torch.compile, default mode, empty caches", _inductor),
        Peer("openvino", "convert_model of the exported program, float32, one stream, results not copied", _openvino,
             ("openvino",)),
        Peer("onnxruntime", "torch.onnx.export with dynamo, CPU provider, all optimisations", _onnxruntime,
             ("onnxruntime", "onnx", "onnxscript")),
    )
}  # fmt: skip
