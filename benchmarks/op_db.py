"""The op database that PyTorch ships, float32, CPU: what becomes of every op under a torch.compile backend.

    python -m benchmarks.op_db [--mode MODE] [--all] [--ops REGEX] [--shards N] [--resume FILE] [--json FILE]

Modes: `forward` compares results, `backward` the gradients of all inputs for fixed random cotangents, and `lowering` asks
which ops Inductor lowers without an ATen fallback, the measure for what plait should need none for; nothing is run then.

Each sample is compiled alone (`fullgraph=True`, everything forgotten before) and compared with eager by
`torch.testing.assert_close`'s defaults, results and arguments after the call, random ops from the same seed. Its class is

    generated       plait graphs ran, and every node is a generated kernel (or a view, which costs nothing)
    library         as generated, but some nodes are library calls that were chosen
    fallback        some nodes run as eager ops because plait has nothing for them, or Dynamo refuses one graph and takes
                    the sample in pieces, of which plait runs some
    not reached     no plait graph ran: Dynamo or AOTAutograd refuse the sample without plait as well, or nothing was left
    raises          plait raises, crashes, or gives no answer in time
    silently wrong  another answer than eager's, and no error; an answer that `assert_close` refuses, but whose largest error
                    against float64 is no larger than eager's, or than twice what float64's own answer moves by with the
                    last digits of the inputs, keeps its class and is counted as close, not equal
    ran             (other backends only) graphs ran and the answer is right

    eager raises    here, so that there is nothing to compare with: some ops need a GPU
    not differentiable  (backward only) no result depends on an input that wants a gradient

By default the most different samples of each op, eight of them forward, four backward; `--all` takes all of them. Work is
spread over processes; a process that crashes or hangs is replaced and its sample counted as *raises*. Shard K appends to
FILE.K; `--resume FILE` goes on where these files end. `--one OP:SAMPLE` runs one sample here and shows the whole error.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import queue
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .machine import ROOT, commit, machine, versions
from .runner import Outcome, Run

NOT_ASKED = ("eager raises", "not differentiable")  # there is no right answer to compare with
CLASSES = (*NOT_ASKED, "generated", "library", "fallback", "ran", "not reached", "raises", "silently wrong")  # best first
RIGHT = ("generated", "library", "fallback", "ran")
WITHOUT_FALLBACK = ("generated", "library")
MODES = {"forward": 8, "backward": 4, "lowering": 2}  # with the number of samples of each op
SAMPLE_SECONDS = 120.0
TASKS_PER_PROCESS = 120  # Dynamo and caches grow; a new process costs a few seconds
QUICK_OPS = ("add", "softmax", "matmul", "cat", "nn.functional.layer_norm", "sum", "where", "sort", "cumsum", "std")

DOC = ROOT / "docs" / "op_db.md"
LOWERED = ROOT / "benchmarks" / "results" / "op_db_inductor.json"

Record = dict[str, Any]


class Worker:
    """A process of `op_db_worker`, read line by line with a time limit."""

    def __init__(self, command: Sequence[str]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `stop`
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0
        )
        self.buffer = b""
        self.tasks = 0

    def send(self, task: Mapping[str, Any]) -> None:
        """Give it a task. A process that is gone is noticed by `receive`."""
        self.tasks += 1
        try:
            self.process.stdin.write(json.dumps(task).encode() + b"\n")  # type: ignore[union-attr]
        except BrokenPipeError:
            return

    def receive(self, seconds: float) -> dict[str, Any] | str:
        """The next message, or the reason why there is none: the process is then gone."""
        deadline = time.monotonic() + seconds
        pipe = self.process.stdout
        assert pipe is not None
        while b"\n" not in self.buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                self.stop()
                return f"no answer within {seconds:.0f} s"
            piece = os.read(pipe.fileno(), 1 << 16)
            if not piece:
                return self._death()
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def _death(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or [""])[-1][:200]
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}: {last}"

    def stop(self) -> None:
        """Kill the process; it holds nothing worth keeping."""
        self.process.kill()
        self.process.wait()
        self.errors.close()


@dataclass
class Shard:
    """One process slot: takes ops from the queue, replaces its process when it dies, appends records to its file."""

    path: Path
    backend: str
    every: bool
    command: Sequence[str]
    most: int = MODES["forward"]
    seconds: float = SAMPLE_SECONDS
    records: list[Record] = field(default_factory=list)
    lost: int = 0

    def drain(self, tasks: queue.Queue[str], done: Mapping[str, set[int]], deadline: float) -> None:
        """Work until the queue is empty or the deadline (monotonic) has passed."""
        worker: Worker | None = None
        with self.path.open("a") as self.file:
            while time.monotonic() < deadline:
                try:
                    op = tasks.get_nowait()
                except queue.Empty:
                    break
                if worker is not None and worker.tasks >= TASKS_PER_PROCESS:
                    worker.stop()
                    worker = None
                worker = self._one_op(worker or Worker(self.command), op, set(done.get(op, ())), deadline)
        if worker is not None:
            worker.stop()

    def _one_op(self, worker: Worker, op: str, skip: set[int], deadline: float) -> Worker | None:
        """Run an op's samples, again from where it stopped after each crash; the process that is left, if any."""
        while True:
            worker.send({"op": op, "every": self.every, "most": self.most, "skip": sorted(skip)})
            current = -1
            while True:
                message = worker.receive(min(self.seconds, max(deadline - time.monotonic(), 0.0)))
                if time.monotonic() > deadline:
                    worker.stop()
                    return None
                if isinstance(message, str):
                    break
                current = message.get("start", current)
                if "record" in message:
                    self._keep(message["record"])
                    skip.add(current)
                if "done" in message:
                    return worker
            self.lost += 1
            self._keep({"op": op, "sample": current, "class": "raises", "layer": self.backend, "reason": message})
            if current < 0 or current in skip:
                return None  # it died outside of a sample: trying again would not end
            skip.add(current)
            worker = Worker(self.command)

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


def settings(backend: str, every: bool, mode: str = "forward") -> dict[str, Any]:
    """What must be equal for a run to go on from the files of an earlier one."""
    ours = {"commit": commit()} if backend == "plait" else {}
    return {"backend": backend, "mode": mode, "every": every, "torch": versions()["torch"]} | ours


def load(stem: Path, wanted: Mapping[str, Any]) -> list[Record]:
    """Records of an earlier run. Raises SystemExit when it ran with other settings."""
    found: list[Record] = []
    for path in sorted(stem.parent.glob(stem.name + ".[0-9]*")):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the last line of a run that was killed while writing it
            if "settings" not in record:
                found.append(record)
            elif record["settings"] != wanted:
                raise SystemExit(
                    f"{path} is of another run: {record['settings']}, not {wanted}; remove it or name another file"
                )
    return found


def run(
    backend: str,
    *,
    every: bool = False,
    mode: str = "forward",
    ops: str | Sequence[str] = "",
    shards: int = 0,
    stem: Path | None = None,
    resume: bool = False,
    seconds: float = float("inf"),
    say: Any = lambda text: None,
) -> list[Record]:
    """Run the database (ops whose key matches the regex `ops`, or those listed) and return all records, earlier ones too."""
    with tempfile.TemporaryDirectory() as scratch:
        stem = stem or Path(scratch) / "op_db.jsonl"
        wanted = settings(backend, every, mode)
        earlier = load(stem, wanted) if resume else []
        if not resume and list(stem.parent.glob(stem.name + ".[0-9]*")):
            raise SystemExit(f"there are results in {stem}.*; go on with --resume {stem} or name another file")
        done: dict[str, set[int]] = collections.defaultdict(set)
        for r in earlier:
            done[r["op"]].add(r["sample"])
        tasks: queue.Queue[str] = queue.Queue()
        names = [n for n in names_of_ops() if re.search(ops, n)] if isinstance(ops, str) else list(ops)
        for name in names:
            tasks.put(name)
        count = min(shards or os.cpu_count() or 1, max(len(names), 1))
        command = [sys.executable, "-m", "benchmarks.op_db_worker", backend, mode]
        slots = [Shard(Path(f"{stem}.{k}"), backend, every, command, MODES[mode]) for k in range(count)]
        for slot in slots:
            with slot.path.open("a") as file:
                file.write(json.dumps({"settings": wanted}) + "\n")
        deadline = time.monotonic() + seconds
        threads = [threading.Thread(target=s.drain, args=(tasks, done, deadline)) for s in slots]
        for t in threads:
            t.start()
        while any(t.is_alive() for t in threads):
            threads[0].join(5.0)
            say(f"{len(names) - tasks.qsize()} of {len(names)} ops, {sum(len(s.records) for s in slots)} samples")
            for t in threads:
                t.join(0.0)
        return earlier + [r for s in slots for r in s.records]


def names_of_ops() -> list[str]:
    """Keys of all entries, from a process of its own: importing the database takes seconds and changes global state."""
    code = "from benchmarks.op_db_worker import entries; print('\\n'.join(sorted(entries())))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def summary(records: Iterable[Record]) -> dict[str, Any]:
    """Counts by class over samples and over ops (an op is as good as its worst sample), and the reasons of the bad ones."""
    records = list(records)
    per_op: dict[str, str] = {}
    for r in records:
        before = per_op.get(r["op"], CLASSES[0])
        per_op[r["op"]] = max(before, r["class"], key=CLASSES.index)
    by_class = collections.Counter(r["class"] for r in records)
    ops = collections.Counter(per_op.values())
    reasons: dict[str, Any] = {}
    for kind in ("fallback", "not reached", "raises", "silently wrong", "eager raises"):
        groups: dict[str, list[str]] = collections.defaultdict(list)
        for r in records:
            if r["class"] == kind:
                groups[_general(r.get("reason", ""))].append(f"{r['op']}:{r['sample']}")
        ranked = sorted(groups.items(), key=lambda g: -len(g[1]))
        reasons[kind] = [
            {"reason": why, "samples": len(at), "such as": at[:6], "ops": sorted({w.rpartition(":")[0] for w in at})}
            for why, at in ranked
        ]
    return {
        "samples": len(records),
        "ops": len(per_op),
        "by sample": {k: by_class[k] for k in CLASSES if by_class[k]},
        "by op": {k: ops[k] for k in CLASSES if ops[k]},
        "values not as assert_close wants": dict(collections.Counter(r["values"] for r in records if "values" in r)),
        "reasons": reasons,
        "ops by class": {k: sorted(o for o, c in per_op.items() if c == k) for k in CLASSES if ops[k]},
    }


def figures(found: Mapping[str, Any], mode: str) -> dict[str, str]:
    """The shares that a run is judged by: ops of which every sample is right, and, forward, those right without a fallback
    among the ops that Inductor lowers without one (`op_db_inductor.json`)."""
    by_class = found["ops by class"]
    right = {op for kind in RIGHT for op in by_class.get(kind, ())}
    asked = {op for kind, ops in by_class.items() if kind not in NOT_ASKED for op in ops}
    shares = {f"{mode}: ops right": _share(right, asked)}
    if mode == "forward" and LOWERED.exists():
        lowered = set(json.loads(LOWERED.read_text())["without fallback"]) & asked
        ours = {op for kind in WITHOUT_FALLBACK for op in by_class.get(kind, ())} & lowered
        shares["without fallback, of the ops that Inductor lowers without one"] = _share(ours, lowered)
    return shares | {"silently wrong": str(found["by op"].get("silently wrong", 0))}


def _share(some: set[str], of: set[str]) -> str:
    return f"{len(some)} of {len(of)} ({len(some) / max(len(of), 1):.1%})"


def write_lowered(found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Keep which ops Inductor lowers without a fallback, and what it falls back to for the others."""
    by_class = found["ops by class"]
    kept = {"settings": dict(about), "without fallback": by_class.get("generated", [])}
    kept |= {kind: by_class.get(kind, []) for kind in ("fallback", "not reached")}
    LOWERED.write_text(json.dumps(kept, indent=1) + "\n")


def _general(reason: str) -> str:
    """A reason without what differs from sample to sample."""
    return re.sub(r"0x[0-9a-f]+|\bu\d+\b|(?<!\w)-?\d+(\.\d+)?(e-?\d+)?", "N", reason)[:160]


def measure(run_: Run) -> Outcome | None:
    """Letter c. A quick run takes ten common ops and as many of their samples as fit."""
    options: dict[str, Any] = {"every": run_.every, "shards": run_.shards, "say": run_.say}
    if run_.quick:
        options = {"ops": QUICK_OPS, "shards": 2, "seconds": 12.0}
    found = summary(run(run_.backend, **options))
    if run_.quick and not found["samples"]:
        return None  # a busy machine: the processes were not up in time
    figure = {"samples": found["samples"], "ops": found["ops"]} | found["by sample"]
    figure.setdefault("silently wrong", 0)
    figure["close, not equal"] = _close(found)
    return Outcome(figure, found["samples"] > 0 and figure["silently wrong"] == 0, found)


def _close(found: Mapping[str, Any]) -> int:
    return sum(n for why, n in found["values not as assert_close wants"].items() if why.startswith("close"))


def breadth(run_: Run) -> Outcome | None:
    """Forward and backward over the database, and the shares that it is judged by. A quick run samples the forward.

    Records go to build/op_db: an interrupted run of a commit goes on, and `--resume FILE --doc` writes the pages from them.
    """
    if run_.quick:
        return measure(run_)
    here, files = commit(), ROOT / "build" / "op_db"
    files.mkdir(parents=True, exist_ok=True)
    figure: dict[str, Any] = {}
    detail: dict[str, Any] = {}
    for mode in ("forward", "backward"):
        run_.say(mode)
        stem = None if here.endswith("+") else files / f"{run_.backend}-{mode}-{here}{'-all' if run_.every else ''}.jsonl"
        how: dict[str, Any] = {"stem": stem, "resume": stem is not None, "say": run_.say}
        found = summary(run(run_.backend, mode=mode, every=run_.every, shards=run_.shards, **how))
        figure |= {f"{mode}, {name}" if name == "silently wrong" else name: s for name, s in figures(found, mode).items()}
        detail[mode] = {k: v for k, v in found.items() if k != "reasons"}
    holds = all(_reached(name, share) for name, share in figure.items())
    return Outcome(figure | {"close, not equal": sum(_close(found) for found in detail.values())}, holds, detail)


WANTED = {"forward: ops right": 0.97, "backward: ops right": 0.92,
          "without fallback, of the ops that Inductor lowers without one": 0.70}  # fmt: skip


def _reached(name: str, share: str) -> bool:
    if name not in WANTED:
        return share == "0"
    part, _, whole = share.split("(")[0].partition(" of ")
    return int(part) >= WANTED[name] * int(whole)


def table(found: Mapping[str, Any]) -> str:
    """Counts as a Markdown table."""
    lines = ["| class | samples | ops (worst sample) |", "|---|---|---|"]
    for kind in CLASSES:
        if kind in found["by sample"] or kind == "silently wrong":
            lines.append(f"| {kind} | {found['by sample'].get(kind, 0)} | {found['by op'].get(kind, 0)} |")
    lines.append(f"| all | {found['samples']} | {found['ops']} |")
    return "\n".join(lines)


def write_results(found: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Put the figures, the counts and the reasons between the mode's markers in docs/op_db.md."""
    mode = about["mode"]
    begin, end = f"<!-- {mode}: begin -->", f"<!-- {mode}: end -->"
    head, rest = DOC.read_text().split(begin)
    lines = [f"{k}: {v}" for k, v in about.items() if k not in ("every", "mode")]
    what = "All samples" if about["every"] else f"The {MODES[mode]} most different samples of each op"
    text = [f"{what}; {', '.join(lines)}.", ""]
    text += [f"- {name}: **{share}**" for name, share in figures(found, mode).items()] + ["", table(found), ""]
    for kind, groups in found["reasons"].items():
        if groups:
            text += [f"### {kind.capitalize()}", "", "| samples | reason | ops |", "|---|---|---|"]
            text += [f"| {g['samples']} | {_cell(g['reason'])} | {', '.join(g['ops'])} |" for g in groups]
            text += [""]
    DOC.write_text(head + begin + "\n" + "\n".join(text) + end + rest.split(end)[1])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def show_one(where: str, backend: str, mode: str) -> int:
    """Run one sample here, with the whole traceback."""
    import torch

    from . import op_db_worker as w

    op, _, index = where.rpartition(":")
    info, backward = w.entries()[op], mode == "backward"
    sample = w.samples(info, backward=backward)[int(index)]
    torch.set_num_threads(1)
    print(f"{op}({w.describe(sample)})")
    lowering = mode == "lowering"
    record = w.classify_lowering(info, sample) if lowering else w.classify(info, sample, backend, backward=backward)
    print(json.dumps(record, indent=1))
    if record["class"] == "raises":
        w.Case.of(info, sample, backward=backward).compiled(backend)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; exit code 1 when a sample is silently wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.op_db", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every sample, not the eight most different of each op")
    parser.add_argument("--ops", default="", metavar="REGEX", help="only ops whose name matches")
    parser.add_argument("--shards", type=int, default=0, help="processes (default: one per core)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write records to FILE.0, FILE.1, …")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on with the records in FILE.*")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write counts, reasons, machine and versions")
    parser.add_argument("--doc", action="store_true", help="write the results into docs/op_db.md (lowering: its data file)")
    parser.add_argument("--backend", default="plait")
    parser.add_argument("--mode", choices=MODES, default="forward", help="what to compare (see above)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this long; go on with --resume")
    parser.add_argument("--one", metavar="OP:SAMPLE", help="run one sample in this process")
    given = parser.parse_args(argv)
    if given.one:
        return show_one(given.one, given.backend, given.mode)
    if given.mode == "lowering":
        given.backend = "inductor"
    about = settings(given.backend, given.all, given.mode)
    records = run(
        given.backend,
        every=given.all,
        mode=given.mode,
        ops=given.ops,
        shards=given.shards,
        stem=given.resume or given.out,
        resume=given.resume is not None,
        seconds=given.seconds,
        say=lambda text: print(f"  {text}", file=sys.stderr, flush=True) if sys.stderr.isatty() else None,
    )
    found = summary(records)
    print(table(found))
    for name, share in figures(found, given.mode).items():
        print(f"{name}: {share}")
    for kind, groups in found["reasons"].items():
        for group in groups[:8]:
            print(f"{kind}: {group['samples']}x {group['reason']} ({', '.join(group['such as'][:3])})")
    if given.json:
        report = {"settings": about, "machine": machine(), "versions": versions(), **found}
        given.json.write_text(json.dumps(report, indent=1) + "\n")
    if given.doc:
        write_lowered(found, about) if given.mode == "lowering" else write_results(found, about)
    return 1 if found["by sample"].get("silently wrong") else 0


if __name__ == "__main__":
    sys.exit(main())
