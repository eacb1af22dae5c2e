"""Endurance: thousands of calls from many threads, processes that share one cache, disks that take nothing.

Children run `child`: they compile small models into the cache that PLAIT_CACHE_DIR names and say whether they are right.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plait
import torch
from plait.codegen.cache import Cache
from torch import nn

from .machine import ROOT
from .plait_seam import fresh
from .runner import Outcome, Run

CALLS, SAMPLE_CALLS, THREADS = 20_000, 2_000, 8
GROWTH_MIB = 16.0
"""How much resident memory may grow after warming up."""
WARM = 0.2
"""The share of the calls that warms up: allocators, threads' stacks and pools reach their size."""
WIDTH = 48
ROWS = (2, 3, 5, 8, 13, 31, 64, 200, 1000)
CHILD_S = 120.0
FULL_KIB = (4, 24, 48, 64)
"""Sizes of disks that are full at once, before a kernel is built, before the runner is, and later."""


class Mixer(nn.Module):
    """Products, a softmax over the rows and a residual: several kernels, an arena, sizes that depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shares = torch.softmax(x.sum(1), 0)
        return x + self.down(torch.relu(self.up(x))) * shares[:, None]


# -- calls ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Usage:
    """What a process holds: resident memory in MiB, open files, threads."""

    memory: float
    files: int
    threads: int

    @staticmethod
    def now() -> Usage:
        """Of this process."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files, tasks = (len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task"))
        return Usage(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files, tasks)


def hammer(call: Callable[[torch.Tensor], torch.Tensor], eager: nn.Module, calls: int) -> dict[str, Any]:
    """Call from THREADS threads over changing shapes; every result is compared with eager's, computed before.

    Growth is what the process holds at the end of the calls above what it held when WARM of them were done.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        inputs = [torch.randn(rows, WIDTH, generator=generator) for rows in ROWS]
        pairs = [(x, eager(x)) for x in inputs]
    wrong: list[str] = []
    phases = threading.Barrier(THREADS + 1)

    def work(seed: int) -> None:
        choose = random.Random(seed)
        with torch.no_grad():
            for x, _ in pairs:
                eager(x)  # starts the team of threads that torch keeps for each thread that calls it
        for count in (round(calls * WARM / THREADS), round(calls * (1 - WARM) / THREADS)):
            with torch.no_grad():  # the grad mode belongs to the thread
                for _ in range(count):
                    x, expected = choose.choice(pairs)
                    try:
                        got = call(x)
                        if got.shape != expected.shape or not torch.allclose(got, expected, rtol=1e-4, atol=1e-5):
                            wrong.append(f"{x.shape[0]} rows: off by {(got - expected).abs().max():.3g}")
                    except Exception as error:
                        wrong.append(f"{x.shape[0]} rows: {error!r}")
            phases.wait()  # the phase is over
            phases.wait()  # and looked at

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    held: list[Usage] = []
    for _ in range(2):
        phases.wait()
        held.append(Usage.now())
        phases.wait()
    for thread in threads:
        thread.join()
    warm, end = held
    return {
        "calls": sum(round(calls * share / THREADS) for share in (WARM, 1 - WARM)) * THREADS,
        "wrong": len(wrong),
        "examples": wrong[:10],
        "growth_mib": round(end.memory - warm.memory, 2),
        "files": end.files - warm.files,
        "threads": end.threads - warm.threads,
    }


def endure(calls: int) -> dict[str, dict[str, Any]]:
    """Half of the calls through a CompiledModel with a dynamic batch, half through torch.compile."""
    torch.manual_seed(0)
    model, x = Mixer().eval(), torch.randn(8, WIDTH)
    owned = plait.compile(model, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=4096)},))
    fresh()
    compiled = torch.compile(copy.deepcopy(model), backend="plait", dynamic=True)
    with torch.no_grad():
        compiled(x)
    found = {"CompiledModel": hammer(owned, model, calls // 2), "torch.compile": hammer(compiled, model, calls // 2)}
    fresh()
    return found


# -- one cache, many processes -----------------------------------------------------------------------------------------

MODELS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "same": lambda x: torch.softmax(x * 2.0 + 1.0, -1),
    "first": lambda x: torch.tanh(x) @ x.t(),
    "second": lambda x: (x - x.mean(-1, keepdim=True)).relu(),
}


def child(names: Sequence[str], go: str = "") -> None:
    """Compile models, once the file `go` is there, and print as JSON what came of it: right or not, warnings, cache."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("plait").addHandler(handler)
    print("ready", flush=True)
    while go and not Path(go).exists():
        time.sleep(0.002)
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    right = []
    for name in names:
        got = plait.compile(MODELS[name], (x,))(x)
        right.append(bool(torch.allclose(got, MODELS[name](x), rtol=1e-4, atol=1e-5)))
    print(json.dumps({"right": all(right), "warnings": said}))


def start(cache: Path, names: Sequence[str], go: str = "") -> subprocess.Popen[str]:
    """A process that runs `child` with this cache."""
    command = [sys.executable, "-c", f"from benchmarks.soak import child; child({list(names)}, {go!r})"]
    env = os.environ | {"PLAIT_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    return subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a child said, or how it failed."""
    try:
        out, err = process.communicate(timeout=CHILD_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return {"right": False, "warnings": [], "error": f"still running after {CHILD_S:g} s"}
    if process.returncode:
        return {"right": False, "warnings": [], "error": err.strip()[-500:]}
    return json.loads(out.splitlines()[-1])


def leftovers(cache: Path) -> list[str]:
    """What no finished compilation leaves in a cache: temporary folders, locks."""
    folder = Cache(cache).base
    found = [*folder.glob("tmp/*"), *folder.glob("locks/*"), *(p for p in (cache / "native").glob("*") if p.is_dir())]
    return sorted(str(p.relative_to(cache)) for p in found)


def together(folder: Path) -> list[str]:
    """Two processes compile one model alike and one each into an empty cache at the same time. What is wrong afterwards."""
    cache, go = folder / "together", folder / "go"
    children = [start(cache, ["same", own], str(go)) for own in ("first", "second")]
    for one in children:
        assert one.stdout is not None
        one.stdout.readline()
    go.touch()
    said = [ended(one) for one in children]
    return [*_complaints(said), *_state(cache), *leftovers(cache)]


def killed(folder: Path) -> list[str]:
    """SIGKILL ends a process while its compiler runs; the next one compiles the same. What is wrong afterwards."""
    cache = folder / "killed"
    victim = start(cache, ["same"])
    deadline = time.monotonic() + CHILD_S
    while not [*cache.glob("v*/tmp/*")] and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    wrong = [] if leftovers(cache) else ["the process was not killed in the middle"]
    return [*wrong, *_complaints([ended(start(cache, ["same"]))]), *_state(cache)]


def _complaints(said: Sequence[Mapping[str, Any]], warnings: int = 0) -> list[str]:
    found = [one.get("error", "a wrong result") for one in said if not one["right"]]
    return found + [
        f"{len(one['warnings'])} warnings: {one['warnings']}" for one in said if len(one["warnings"]) != warnings
    ]


def _state(cache: Path) -> list[str]:
    """What is wrong with a cache: damaged entries, kinds that are missing."""
    kept = Cache(cache)
    damaged = [f"entry {digest[:12]}: {why}" for digest, why in kept.verify()]
    kinds = {e.key.kind for e in kept.entries()}
    return damaged + [f"no entry of kind {kind}" for kind in ("graph", "kernel", "objects") if kind not in kinds]


# -- disks that take nothing -------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[bool]:
    """A tmpfs at `folder`; False where this user may not mount."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False)
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def unwritable(folder: Path) -> dict[str, list[str] | str]:
    """A cache on a full disk and on one that is read-only: the model is right, and one warning says why nothing is kept."""
    found: dict[str, list[str] | str] = {}
    full = [(f"full disk, {size} KiB", f"size={size}k,mode=700") for size in FULL_KIB]
    for number, (name, options) in enumerate([*full, ("read-only folder", "ro,mode=700")]):
        cache = folder / f"disk{number}"
        with mounted(cache, options) as could:
            if not could:
                found[name] = "skipped: it needs the right to mount"
                continue
            said = ended(start(cache, ["same", "first", "second"]))
            found[name] = _complaints([said], warnings=1)
    return found


def measure(run: Run) -> Outcome:
    """Calls from threads, processes that share a cache, disks that take nothing. A quick run takes a tenth of the calls."""
    detail: dict[str, Any] = {}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="plait-soak-")))
        run.say("calls")
        detail["calls"] = endure(SAMPLE_CALLS if run.quick else CALLS)
        if not run.quick:
            run.say("processes")
            detail["two processes"] = together(folder)
            detail["killed"] = killed(folder)
            run.say("disks")
            detail |= unwritable(folder)
    calls = detail["calls"].values()
    figure: dict[str, Any] = {
        "calls": sum(c["calls"] for c in calls),
        "wrong": sum(c["wrong"] for c in calls),
        "growth": f"{max(c['growth_mib'] for c in calls):.1f} MiB",
        "files": max(c["files"] for c in calls),
        "threads": max(c["threads"] for c in calls),
    }
    others = {k: v for k, v in detail.items() if k != "calls"}
    figure |= {k: v if isinstance(v, str) else "; ".join(v) or "right" for k, v in others.items()}
    held = all(c["growth_mib"] <= GROWTH_MIB and c["files"] <= 0 and c["threads"] <= 0 for c in calls)
    fine = not figure["wrong"] and held and all(isinstance(v, str) or not v for v in others.values())
    return Outcome(figure, fine, detail)
