"""Timelines of calls, predicted and measured, as Chrome traces: what each step took, and collectives that ran beside them.

model.trace("model.json")    # predicted and measured; open it in Perfetto, https://ui.perfetto.dev
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..codegen.compile import CompiledGraph
from ..cost.estimate import COMMUNICATION, COMPUTE
from ..runtime.collectives import Record
from ..runtime.executor import Executable, Span
from ..runtime.plan import Call, Launch, Plan
from .predicted import Prediction, predict
from .profile import own_copies

Event = dict[str, Any]

PROCESS = 1  # next to what was predicted, which is process 0


def predicted(compiled: CompiledGraph, executable: Executable, inputs: Sequence[Any]) -> Prediction:
    """The prediction for a call on flat `inputs`, which are left as they are. Where there are no collectives it is what its
    steps were measured to take. Raises what calls raise."""
    given = own_copies(compiled, inputs)
    return predict(compiled, lambda: executable(*given), executable=executable)


def both(plan: Plan, prediction: Prediction) -> list[Event]:
    """Events of what was predicted of a call, and of a measured one beside it."""
    return prediction.timeline.trace() + events(plan, prediction.spans, prediction.records)


def events(
    plan: Plan, spans: Sequence[Span], records: Iterable[Record] = (), *, process: int = PROCESS, label: str = "measured"
) -> list[Event]:
    """Events of a Chrome trace: a process named `label` with a thread for the steps of a plan, and one for collectives of
    each group that `records` holds. Times are microseconds from the first of these on."""
    records = list(records)
    begin = min([*(start for _, start, _ in spans), *(r.start for r in records)], default=0)
    groups = list(dict.fromkeys(r.group for r in records))
    threads = [COMPUTE, *([COMMUNICATION] if len(groups) == 1 else [f"{COMMUNICATION} {group}" for group in groups])]
    found: list[Event] = [{"ph": "M", "pid": process, "name": "process_name", "args": {"name": label}}]
    found += [
        {"ph": "M", "pid": process, "tid": i, "name": "thread_name", "args": {"name": name}}
        for i, name in enumerate(threads)
    ]

    def event(thread: int, name: str, start: int, end: int, **more: Any) -> Event:
        times = {"ts": (start - begin) / 1e3, "dur": (end - start) / 1e3}
        return {"ph": "X", "pid": process, "tid": thread, "name": name, **times, "args": more}

    found += [event(0, _name(plan.steps[i]), start, end, step=i, **_origin(plan.steps[i])) for i, start, end in spans]
    return found + [
        event(1 + groups.index(r.group), r.name.split(",")[0], r.start, r.end, group=r.group, bytes=r.bytes) for r in records
    ]


def write(path: str | Path, found: Sequence[Event]) -> None:
    """Write events as a Chrome trace. Raises OSError."""
    Path(path).write_text(json.dumps({"traceEvents": list(found), "displayTimeUnit": "ms"}))


def _name(step: Launch | Call) -> str:
    return step.kernel if isinstance(step, Launch) else step.op.removesuffix(".default")


def _origin(step: Launch | Call) -> dict[str, str]:
    return {"source": step.origin} if isinstance(step, Call) and step.origin else {}


__all__ = ["Event", "both", "events", "predicted", "write"]
