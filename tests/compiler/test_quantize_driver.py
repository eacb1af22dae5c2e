"""`plait.quantize` and `plait.what_if` from Python: calibration files by the names of arguments, tables, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.compiler.export import argument_names, capture_model
from plait.compiler.quantize.plan import run_pass
from plait.compiler.quantize.resume import Kept
from plait.errors import BadOption, CannotReplace, CannotResume
from plait.passes.base import Context
from plait.passes.quantize.weights import Rtn
from safetensors.torch import save_file
from torch import nn

SEED = 5


class Pair(nn.Module):
    """Two inputs of different sizes: a calibration file must bring the right one to each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(SEED)
        self.left, self.right = nn.Linear(32, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.left(x)) * self.right(y)


def inputs(samples: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(SEED)
    return {"y": torch.randn(samples, 64, generator=g), "x": torch.randn(samples, 32, generator=g)}


def batches(samples: int = 12) -> list[tuple[torch.Tensor, torch.Tensor]]:
    both = inputs(samples)
    return list(zip(both["x"].split(1), both["y"].split(1), strict=True))


def test_files_go_by_the_names_of_arguments(tmp_path: Path) -> None:
    save_file(inputs(12), tmp_path / "both.safetensors")
    model = Pair().eval()
    assert argument_names(model) == ("x", "y")
    path = str(tmp_path / "both.safetensors")
    by_file = plait.quantize(model, path, scheme="awq-w4g32", want="any")
    by_list = plait.quantize(model, batches(), scheme="awq-w4g32", want="any")
    assert [one.loss for one in by_file.layers] == [one.loss for one in by_list.layers]
    assert by_file.error == pytest.approx(by_list.error) and by_file.error > 0
    three = torch.ones(3, 32), torch.ones(3, 64)
    few = plait.quantize(model, path, scheme="awq-w4g32", want="any", samples=3, examples=three)
    assert len(few.batches) == 1 and few.layers[0].rows_seen == 3
    compiled = plait.compile(model, batches()[0], passes=["awq:want=any,group=32"], options={"calibration": path})
    assert "quantized_linear" in str(compiled.graph)


def test_a_function_and_a_program_file_have_names(tmp_path: Path) -> None:
    program = torch.export.export(Pair().eval(), batches()[0])
    torch.export.save(program, tmp_path / "pair.pt2")
    assert argument_names(program) == ("x", "y") == argument_names(lambda x, y: x @ y)
    save_file(inputs(12), tmp_path / "both.safetensors")
    done = plait.quantize(str(tmp_path / "pair.pt2"), str(tmp_path / "both.safetensors"), scheme="rtn-w8g32", want="any")
    assert [one.name for one in done.layers] == ["left", "right"]
    torch.testing.assert_close(done(*batches()[0]), Pair()(*batches()[0]), rtol=0, atol=0.05)
    with pytest.raises(CannotReplace):
        done.module()


def test_what_if_changes_nothing() -> None:
    model = Pair().eval()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    table = plait.what_if(model, batches(), formats=["w8g32", "w3g32"], rows=[1], want="any", ignore=["right"])
    assert [(o.layer, str(o.format)) for o in table.options] == [("left", f) for f in ("w8g32", "w3g32", "float")]
    assert table.options[0].error < table.options[1].error and table.chosen == {}
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_layers_of_their_own_and_a_budget_exclude_each_other() -> None:
    with pytest.raises(BadOption, match="where a budget chooses"):
        plait.quantize(Pair().eval(), batches(), budget="bytes=30%", layers=["left=w8g32"])


def found(ctx: Context, graph: Any, bits: int) -> list[str]:
    return [str(one.type) for one in run_pass(graph, Rtn(bits=bits, group=32, want="any"), ctx)[1].layers]


def test_finished_layers_are_used_in_the_format_that_they_have(tmp_path: Path) -> None:
    """A budget tries several formats: what was finished in one is no answer for another."""
    graph = capture_model(Pair().eval(), batches()[0]).graph
    flat = tuple(batches())
    kept = Kept(tmp_path, graph, flat, "call")
    found(Context(at="forward", calibration=flat, keep=kept.keep), graph, 4)
    again = Kept(tmp_path, graph, flat, "call")
    assert len(again.known) == 2
    for bits in (4, 8):
        types = found(Context(at="forward", calibration=flat, known=again.known), graph, bits)
        assert types == [f"u{bits}g32[64,32]", f"u{bits}g32[64,64]"]


def test_a_folder_stands_in_the_way_of_other_calls_only_with_finished_layers(tmp_path: Path) -> None:
    graph, flat = capture_model(Pair().eval(), batches()[0]).graph, tuple(batches())
    Kept(tmp_path / "a", graph, flat, "one call")
    kept = Kept(tmp_path / "a", graph, flat, "another call")
    found(Context(at="forward", calibration=flat, keep=kept.keep), graph, 4)
    with pytest.raises(CannotResume, match="begun for another"):
        Kept(tmp_path / "a", graph, flat, "one call")
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotResume):
        Kept(tmp_path / "file", graph, flat, "one call")
