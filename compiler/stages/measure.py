"""What a model's layers cost on this machine: each layer of a captured forward compiled alone, run on real batches, timed.

The forward is cut behind every layer and run in one process as that many stages, on one micro-batch at a time, for several
numbers of rows. What is compiled for one layer serves all that compute the same (kernels are cached by their content).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...cost.curve import Curve
from ...cost.device import cpu_name
from ...cost.microbatches import Action, Schedule
from ...errors import BadProfile, BadSource
from ...ir import TensorType, Value
from ...passes.stages.layering import bytes_of
from ...passes.stages.layers import NOTHING, FrozenLayer, Layer, Links, Profile
from ...passes.stages.stages import Cutting
from ..options import Options
from ..pipelines import Session
from ..source import call_factory
from .capture import capture
from .execute import Batch, Event, Layout, Rank
from .programs import Frozen, Trained
from .staged import Staged, staged

ROUNDS = 7
MOST_LAYERS = 64

Progress = Callable[[int, int, str], None]


def profile_of(
    src: str,
    path: str | Path | None = None,
    *,
    rows: Sequence[int] = (),
    links: Links | None = None,
    optimizer: float = 4.0,
    most: int = MOST_LAYERS,
    progress: Progress | None = None,
) -> Profile:
    """The profile of the model that `src` names: read from `path` where there is such a file, else measured and written
    there. The factory gives (model, loss, batch), as `staged_step` takes them. Raises BadSource, BadProfile, OSError, and
    what capturing raises."""
    if path is not None and Path(path).exists():
        return read(path)
    found = call_factory(src)
    if (
        not isinstance(found, tuple)
        or len(found) != 3
        or not isinstance(found[0], torch.nn.Module)
        or not callable(found[1])
    ):
        raise BadSource(src=src, why="to be planned it has to return a tuple of the model, the loss and a batch")
    model, loss, batch = found
    batch = batch if isinstance(batch, tuple) else (batch,)
    made = measure(model, loss, batch, rows=rows, links=links, optimizer=optimizer, most=most, progress=progress)
    if path is not None:
        Path(path).write_text(json.dumps(made.to_json(), indent=1))
    return made


def read(path: str | Path) -> Profile:
    """The profile that a JSON file holds. Raises BadProfile."""
    try:
        return Profile.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise BadProfile(why=f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # JSON, or text that is no UTF-8
        raise BadProfile(why=f"{path} is no JSON: {error}") from error


def measure(
    model: torch.nn.Module,
    loss: Callable[..., Any],
    batch: tuple[Any, ...],
    *,
    rows: Sequence[int] = (),
    links: Links | None = None,
    optimizer: float = 4.0,
    most: int = MOST_LAYERS,
    progress: Progress | None = None,
) -> Profile:
    """Measure the layers of `loss(model, *batch)`, at most `most` of them, on parts of a batch with so many `rows` each (by
    default all of the batch, a quarter, and one). Parameters are left as they are. Raises what capturing raises."""
    whole = next((len(t) for t in pytree.tree_leaves(batch) if isinstance(t, torch.Tensor) and t.dim()), 0)
    sizes = sorted(set(rows) or {1, max(whole // 4, 1), whole})
    found: list[_Measured] = []
    for i, size in enumerate(sizes):
        if progress is not None:
            progress(i, len(sizes), f"layers on {size} rows")
        found.append(_Measured(model, loss, _first(batch, size), size, most))
    last = found[-1]
    for one in found:
        if len(one.staged.stages) != len(last.staged.stages) or len(one.staged.frozen) != len(last.staged.frozen):
            why = f"its graph has other layers for {one.rows} rows than for {last.rows}"
            raise BadProfile(why=why)
    layers = tuple(_layer(found, s) for s in range(len(last.staged.stages)))
    frozen = tuple(_frozen(found, i) for i in range(len(last.staged.frozen)))
    return Profile((layers,), frozen, links or Links(), optimizer, device=cpu_name()).checked()


def _first(batch: tuple[Any, ...], rows: int) -> tuple[Any, ...]:
    found: tuple[Any, ...] = pytree.tree_map(
        lambda t: t[:rows] if isinstance(t, torch.Tensor) and t.dim() else t, batch
    )  # fmt: skip
    return found


class _Measured:
    """All layers on so many rows: median seconds by (kind, layer)."""

    def __init__(
        self, model: torch.nn.Module, loss: Callable[..., Any], batch: tuple[Any, ...], rows: int, most: int
    ) -> None:
        self.rows = rows
        captured = capture(model, loss, batch)
        self.cutting = Cutting.of(captured.graph, captured.trained, most=most)
        self.staged = staged(captured, self.cutting, [cut.position for cut in self.cutting.cuts])
        count = len(self.staged.stages)
        session = Session("profile", Options.of({}))
        programs: dict[int, Trained] = {}
        for s, region in enumerate(self.staged.stages):
            made = self.staged.program(session, region, 1.0)
            assert isinstance(made, Trained)
            programs[s] = made
        self.programs = programs
        frozen = [self.staged.program(session, region, 1.0) for region in self.staged.frozen]
        forward = [Action(s, "F", 0) for s in range(count)]
        backward = [Action(s, kind, 0) for s in reversed(range(count)) for kind in "IW"]
        whole = [Action(s, "B", 0) for s in reversed(range(count))]
        samples: dict[tuple[str, int], list[float]] = {}
        kept = {n: t.detach().clone() for n, t in self.staged.state.items() if any(n == w for w, _ in self.staged.writes)}
        leaves = pytree.tree_leaves(batch)
        for order in (backward, whole):
            schedule = Schedule("layers", ((*forward, *order),), (tuple(range(count)),))
            layout = Layout(schedule, (0,), ((),))
            rank = Rank(self.staged, layout, 0, programs, [f for f in frozen if isinstance(f, Frozen)], None, [], 0)
            rank.step(Batch([leaves], 0), None)  # builds what is not built yet
            rank.watching.append(events := list[Event]())
            for step in range(ROUNDS):
                rank.step(Batch([leaves], step), None)
            for event in events:
                samples.setdefault((event.kind, event.of), []).append((event.end - event.start) / 1e9)
        for n, t in kept.items():
            self.staged.state[n].copy_(t)
        self.seconds: Mapping[tuple[str, int], float] = {k: statistics.median(v) for k, v in samples.items()}


def _layer(found: Sequence[_Measured], s: int) -> Layer:
    last = found[-1]
    staged_ = last.staged
    region = staged_.stages[s]
    crossing = (
        [_bytes(one.staged, one.staged.crossing[s]) for one in found] if s < len(staged_.crossing) else [0.0] * len(found)
    )
    back = [_bytes(one.staged, one.staged.crossing_back[s]) for one in found] if s < len(staged_.crossing) else [0.0]
    per_row, fixed = _line([one.rows for one in found], crossing)
    parameters = [n for n in region.reads if n in staged_.state and n in staged_.gradients]
    size = float(sum(_bytes(staged_, [n]) for n in parameters))
    return Layer(
        f"{s}: {last.cutting.place(s)}",
        _curve(found, "F", s),
        _curve(found, "B", s),
        _curve(found, "W", s),
        crossing=per_row,
        crossing_back=back[-1] / last.rows,
        crossing_fixed=fixed,
        saved=_saved(last.programs[s]) / last.rows,
        saved_for_weight=_saved_for_weight(last.programs[s]) / last.rows,
        parameters=size,
        gradients=size,
    )


def _frozen(found: Sequence[_Measured], i: int) -> FrozenLayer:
    last = found[-1]
    region = last.staged.frozen[i]
    read = {n for reads in last.staged.frozen_reads for n in reads}
    reads = set(region.reads)
    after = tuple(j for j in range(i) if reads & set(last.staged.frozen[j].gives))
    out = _bytes(last.staged, [n for n in region.gives if n in read]) / last.rows
    return FrozenLayer(f"{i}: {last.cutting.frozen_place(i)}", _curve(found, "frozen", i), out, after)


def _curve(found: Sequence[_Measured], kind: str, of: int) -> Curve:
    points = [(float(one.rows), one.seconds.get((kind, of), 0.0)) for one in found]
    return Curve.of(points) if any(s for _, s in points) else NOTHING


def _line(rows: Sequence[int], sizes: Sequence[float]) -> tuple[float, float]:
    """What sizes are per row, and at no row."""
    if len(rows) < 2 or rows[-1] == rows[0]:
        return sizes[-1] / max(rows[-1], 1), 0.0
    per_row = (sizes[-1] - sizes[0]) / (rows[-1] - rows[0])
    return per_row, max(sizes[0] - per_row * rows[0], 0.0)


def _bytes(of: Staged, numbers: Sequence[int]) -> float:
    return float(sum(bytes_of(Value(of.types[n])) for n in numbers if isinstance(of.types[n], TensorType)))


def _saved(program: Trained) -> float:
    """Bytes that a stage keeps from F to B besides its own parameters and inputs."""
    graph = program.forward.captured
    kept = dict.fromkeys(v for v in graph.outputs[program.outputs :] if isinstance(v, Value) and v not in graph.inputs)
    return float(sum(bytes_of(v) for v in kept))


def _saved_for_weight(program: Trained) -> float:
    """Bytes that W reads besides parameters."""
    parts = program.parts()
    if parts.weight is None:
        return 0.0
    return float(sum(bytes_of(v) for v in parts.weight.captured.inputs))


__all__ = ["MOST_LAYERS", "measure", "profile_of", "read"]
