"""Jobs for two ranks whose results are kept under build/overlap, so that an interrupted run of a commit goes on."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from ..machine import ROOT, commit
from .network import Link, finish, folder, free_port, start_on_loopback

KEPT = ROOT / "build" / "overlap"


def surroundings() -> dict[str, str]:
    """Environment variables of ranks: this checkout, and a port of their own."""
    return {"PYTHONPATH": os.pathsep.join(map(str, (ROOT.parent, ROOT))), "MASTER_PORT": str(free_port())}


def result(module: str, job: Mapping[str, Any], link: Link | None, timeout: float, *, fresh: bool) -> Any:
    """What `benchmarks.overlap.MODULE` writes to `out` when two ranks run it with a job: over a link, else on loopback.

    Unless it must be `fresh`, a result of the same job at the same commit is taken from where it was kept. Raises SystemExit
    with the end of a rank's log where one fails or does not end within `timeout` seconds.
    """
    text = json.dumps([commit(), module, link is not None, dict(job)], sort_keys=True)
    kept = KEPT / f"{module}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    if not fresh and kept.exists() and "+" not in commit():
        return json.loads(kept.read_text())
    where = folder()
    out = where / "out.json"
    (where / "job.json").write_text(json.dumps({**job, "out": str(out)}))
    command = [sys.executable, "-m", f"benchmarks.overlap.{module}", str(where / "job.json")]
    started = (link.start if link else start_on_loopback)(command, where, surroundings())
    codes = finish(started, timeout)
    if any(codes) or not out.exists():
        worst = next((r for r, code in enumerate(codes) if code > 0), 0)
        end = (where / f"rank{worst}.log").read_text()[-3000:]
        raise SystemExit(f"{module} ended with {codes}, logs are in {where}; rank {worst} says:\n{end}")
    found = json.loads(out.read_text())
    KEPT.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(found, indent=1))
    return found
