"""Letter e: what ranks say, and how soon, when another one dies, stalls or runs another plan.

Each fault has processes of its own (`fault_rank.py`), since a group that failed once is broken.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any

from plait.errors import ChannelBroken, CollectiveFailed, CollectiveTimedOut, PlansDiffer

from ..runner import Outcome, Run
from .jobs import surroundings
from .network import Link, folder, start_on_loopback, stop

TIMEOUT_S = 4.0
"""The setting collective_timeout_s of these ranks, from their first step on."""
GRACE_S = 5.0
"""How much later than its time-out an error may come, and a process end after its error."""
STARTING_S = 180.0
"""Processes start and compile within that."""

Ranks = Sequence[Popen[str]]
DIED, STALLED, DIFFER = CollectiveFailed.code, CollectiveTimedOut.code, PlansDiffer.code


def _kill(ranks: Ranks, _: Link | None) -> None:
    os.killpg(ranks[1].pid, signal.SIGKILL)


def _suspend(ranks: Ranks, _: Link | None) -> None:
    os.killpg(ranks[1].pid, signal.SIGSTOP)


def _cut(_: Ranks, link: Link | None) -> None:
    assert link is not None
    link.run(1, "ip", "link", "set", link.devices[1], "down")


def _throttle(_: Ranks, link: Link | None) -> None:
    assert link is not None
    link.run(1, *f"tc qdisc add dev {link.devices[1]} root tbf rate 1kbit burst 2kb limit 64mb".split())


@dataclass(frozen=True)
class Fault:
    """What befalls two ranks: `happens` while they train, or else they run other `passes`.

    `codes` are the errors that a rank may end with; who is not named has been killed or suspended. `linked`: over a link
    that can be cut.
    """

    codes: Mapping[int, tuple[str, ...]]
    happens: Callable[[Ranks, Link | None], None] | None = None
    passes: tuple[str, str] = ("overlap-chunks:around=layer,count=2",) * 2
    linked: bool = False
    gate: str = "switch"

    def job(self) -> dict[str, Any]:
        """What the ranks are told."""
        return {"passes": self.passes, "gate": self.gate, "ends": not self.codes}


BOTH_STALL = {0: (STALLED, DIED), 1: (STALLED, DIED)}
"""Who times out first closes its connections, which the other one may see before its own time is up."""
FAULTS: Mapping[str, Fault] = {
    "killed": Fault({0: (DIED,)}, _kill),
    "other number of pieces": Fault(
        {0: (DIFFER,), 1: (DIFFER,)}, passes=("overlap-chunks:around=layer,count=2", "overlap-chunks:around=layer,count=4")
    ),
    "expert without tokens": Fault({}, gate="barred"),
    "suspended": Fault({0: (STALLED,)}, _suspend),
    "link down": Fault(BOTH_STALL, _cut, linked=True),
    "link of 1 kbit/s": Fault(BOTH_STALL, _throttle, linked=True),
}
SAMPLE = "killed"


def measure(run: Run) -> Outcome:
    """Seconds from each fault until each rank that is left has raised its error, and which."""
    figure: dict[str, Any] = {"time-out": f"{TIMEOUT_S:g} s"}
    detail: dict[str, Any] = {}
    for name, fault in FAULTS.items():
        if run.quick and name != SAMPLE:
            continue
        if fault.linked and not Link.available():
            figure[name] = "not measured without network namespaces"
            continue
        run.say(name)
        detail[name] = tried(fault)
        figure[name] = said(detail[name])
    return Outcome(figure, all(found["holds"] for found in detail.values()), detail)


def said(found: Mapping[str, Any]) -> str:
    """In a few words what became of a fault."""
    each = [f"rank {r} {one['code']} after {one['seconds']:.1f} s" for r, one in found["errors"].items()]
    if not found["expected"] and found["holds"]:
        each = ["trains as it does in one piece"]
    return "; ".join(each or ["nothing was said"]) + ("" if found["holds"] else " (FAILS)")


def tried(fault: Fault) -> dict[str, Any]:
    """Run one fault: the errors of ranks that have one, whether they are as they must be, and the logs otherwise."""
    where = folder()
    (where / "job.json").write_text(json.dumps({**fault.job(), "timeout": TIMEOUT_S}))
    command = [sys.executable, "-m", "benchmarks.overlap.fault_rank", str(where)]
    with Link() if fault.linked else contextlib.nullcontext() as link:
        ranks = (link.start if link else start_on_loopback)(command, where, surroundings())
        try:
            begun = _training(ranks, where)
            if fault.happens is not None:
                time.sleep(0.3)
                begun = time.monotonic()
                fault.happens(ranks, link)
            end = time.monotonic() + (TIMEOUT_S + 2 * GRACE_S if fault.codes else STARTING_S)
            left = fault.codes or range(2)
            for r in left:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    ranks[r].wait(max(end - time.monotonic(), 0.0))
            ended = all(ranks[r].poll() == 0 for r in left)
        finally:
            stop(ranks)
    told = [told_by(where, r) for r in range(2)]
    holds = ended and (_in_time(fault, told, begun) if fault.codes else all(lines[-1].get("equal") for lines in told))
    errors = {r: {**line, "seconds": line["at"] - begun} for r, lines in enumerate(told) for line in lines if "code" in line}
    logs = [] if holds else [(where / f"rank{r}.log").read_text()[-3000:] for r in range(2)]
    return {"expected": fault.codes, "holds": holds, "errors": errors, "logs": logs}


def _in_time(fault: Fault, told: Sequence[Sequence[Mapping[str, Any]]], begun: float) -> bool:
    """Whether each rank that is left raised what it must, soon enough, and then refused to go on."""
    for r, codes in fault.codes.items():
        error = next((line for line in told[r] if "code" in line), None)
        if error is None or error["code"] not in codes or error["at"] - begun > TIMEOUT_S + GRACE_S:
            return False
        if error["then"] != (DIFFER if error["code"] == DIFFER else ChannelBroken.code):
            return False
    return True


def _training(ranks: Ranks, where: Path) -> float:
    """Wait until both ranks have made a step or have failed; when the later one asked whether the other runs the same."""
    end = time.monotonic() + STARTING_S
    while time.monotonic() < end and all(p.poll() is None for p in ranks):
        if all(any("loss" in line or "code" in line for line in told_by(where, r)) for r in range(2)):
            break
        time.sleep(0.05)
    return max((line["at"] for r in range(2) for line in told_by(where, r) if "asks" in line), default=time.monotonic())


def told_by(where: Path, rank: int) -> list[dict[str, Any]]:
    """The lines that a rank has written so far."""
    path = where / f"told{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []
