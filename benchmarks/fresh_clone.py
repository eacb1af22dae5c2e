"""`make demo` and `make test`, each in a fresh clone of the committed state: seconds and exit code."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from .machine import ROOT
from .runner import Outcome, Run

TARGETS = ("demo", "test")


def measure(run: Run) -> Outcome:
    """Letter a. It installs packages and runs everything: many minutes, so only when asked for."""
    detail: dict[str, Any] = {}
    for target in TARGETS:
        with tempfile.TemporaryDirectory(prefix="plait-clone-") as folder:
            clone = Path(folder) / "plait"
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
            run.say(f"make {target} in a fresh clone")
            start = time.monotonic()
            done = subprocess.run(["make", target], cwd=clone, env=_clean(), capture_output=True, text=True)
            seconds = round(time.monotonic() - start, 1)
            detail[target] = {"exit code": done.returncode, "seconds": seconds, "tail": done.stdout.splitlines()[-25:]}
            if done.returncode:
                detail[target]["errors"] = done.stderr.splitlines()[-25:]
    figure = {f"make {t}": f"exit {row['exit code']} in {row['seconds']} s" for t, row in detail.items()}
    return Outcome(figure, all(row["exit code"] == 0 for row in detail.values()), detail)


def _clean() -> dict[str, str]:
    """The environment without the virtual environment that this process runs in."""
    inside = str(ROOT / ".venv")
    path = os.pathsep.join(p for p in os.environ["PATH"].split(os.pathsep) if not p.startswith(inside))
    return {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")} | {"PATH": path}
