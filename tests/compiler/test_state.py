"""Models that write their own buffers, and their inputs: compiled, saved, loaded, and called several times."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from click.testing import CliRunner
from plait import errors
from plait.compiler.cli import main
from torch import nn

TARGET = "cpu:x86-64-v3"


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x * self.count


class KeyValueCache(nn.Module):
    """A decoding step over a cache that no state_dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 8)
        self.register_buffer("keys", torch.zeros(6, 4), persistent=False)
        self.register_buffer("values", torch.zeros(6, 4), persistent=False)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        key, value = self.project(x).chunk(2, -1)
        self.keys.index_copy_(0, at, key)
        self.values.index_copy_(0, at, value)
        return torch.softmax(x @ self.keys.t(), -1) @ self.values


class TiedBuffers(nn.Module):
    """One buffer under two names, written through both; the input is written too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.zeros(4))
        self.register_buffer("b", self.a, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.a.add_(x)
        before = self.b * 2
        self.b.mul_(0.5)
        x.add_(1)
        return before + self.a


class Transposed(nn.Module):
    """A buffer that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 4).t())
        self.inner = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(self.inner(x).t() @ x, 0.5)
        return x @ self.mean.t()


def step(i: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(1, 4), torch.tensor([i])


CASES: dict[str, tuple[nn.Module, Callable[[int], tuple[torch.Tensor, ...]], dict[str, Any]]] = {
    "batch norm": (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), lambda i: (torch.randn(5, 4),), {"training": True},
    ),
    "counter": (Counter().eval(), lambda i: (torch.randn(3),), {}),
    "cache": (KeyValueCache().eval(), step, {}),
    "tied": (TiedBuffers().eval(), lambda i: (torch.randn(4),), {}),
    "transposed": (Transposed().eval(), lambda i: (torch.randn(2, 3),), {}),
}  # fmt: skip


def save(model: nn.Module, args: tuple[Any, ...], path: Path, options: Any = None) -> plait.CompiledModel:
    compiled = plait.compile(model, args, options=options)
    compiled.save(path, targets=TARGET)
    return compiled


def same_calls(model: Any, twin: nn.Module, inputs: Callable[[int], tuple[torch.Tensor, ...]], times: range) -> None:
    """The model and its eager twin give equal results on equal inputs, and leave the inputs equal."""
    for i in times:
        given = inputs(i)
        copies = [t.clone() for t in given]
        with torch.no_grad():
            expected = twin(*copies)
        torch.testing.assert_close(model(*given), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(list(given), copies)
    buffers = dict(twin.named_buffers(remove_duplicate=False))
    assert model.state
    for name, tensor in model.state.items():
        torch.testing.assert_close(tensor, buffers[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_calls_go_on_from_each_other_as_in_eager(case: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs, options = CASES[case]
    model, path = copy.deepcopy(model), tmp_path / "m.plait"
    compiled = save(model, inputs(0), path, options)
    untouched = path.read_bytes()
    loaded, other = plait.load(path), plait.load(path)
    start = {name: t.clone() for name, t in other.state.items()}
    same_calls(loaded, copy.deepcopy(model), inputs, range(4))
    torch.testing.assert_close(dict(other.state), start, rtol=0, atol=0)
    same_calls(other, copy.deepcopy(model), inputs, range(3))
    same_calls(compiled, copy.deepcopy(model), inputs, range(3))
    assert path.read_bytes() == untouched


def test_what_is_saved_is_the_state_at_that_time(tmp_path: Path) -> None:
    compiled = plait.compile(Counter().eval(), (torch.ones(3),))
    compiled(torch.ones(3))
    compiled(torch.ones(3))
    compiled.save(tmp_path / "later.plait", targets=TARGET)
    assert compiled(torch.ones(3)).tolist() == [3.0] * 3
    loaded = plait.load(tmp_path / "later.plait")
    assert loaded.state["count"].item() == 2
    assert loaded(torch.ones(3)).tolist() == [3.0] * 3
    loaded.state["count"].zero_()
    assert loaded(torch.ones(3)).tolist() == [1.0] * 3
    with pytest.raises(TypeError):
        loaded.state["count"] = torch.tensor(5)  # type: ignore[index]


def test_tied_buffers_are_one_and_all_names_show_it(tmp_path: Path) -> None:
    save(TiedBuffers().eval(), (torch.randn(4),), tmp_path / "m.plait")
    loaded = plait.load(tmp_path / "m.plait")
    assert list(loaded.state) == ["a", "b"] and loaded.state["a"] is loaded.state["b"]
    assert [spec.get("written") for spec in loaded.inputs] == [True]


def test_buffers_that_share_memory_otherwise_are_refused() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("whole", torch.zeros(4))
            self.register_buffer("part", self.whole[2:])
            self.register_buffer("apart", torch.zeros(8)[4:])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.whole.add_(x)
            return self.part + self.apart.sum()

    with pytest.raises(errors.CannotImport, match=r"part.*shares memory with whole"):
        plait.compile(Part().eval(), (torch.ones(4),))


def test_a_step_back_in_the_history_has_buffers_of_its_own() -> None:
    compiled = plait.compile(Counter().eval(), (torch.ones(3),))
    then = compiled.run_until("lower")
    assert then(torch.ones(3)).tolist() == then.state["count"].expand(3).tolist() == [1.0] * 3
    assert compiled.state["count"].item() == 0


def test_in_and_out_of_inference_mode(tmp_path: Path) -> None:
    save(KeyValueCache().eval(), step(0), tmp_path / "m.plait")
    with torch.inference_mode():
        loaded = plait.load(tmp_path / "m.plait")
        loaded(*step(0))
    loaded(*step(1))
    loaded.state["keys"].zero_()


def test_threads_take_turns(tmp_path: Path) -> None:
    save(Counter().eval(), (torch.ones(3),), tmp_path / "m.plait")
    loaded = plait.load(tmp_path / "m.plait")
    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda _: loaded(torch.ones(3))[0].item(), range(400)))
    assert sorted(seen) == list(range(1, 401)) and loaded.state["count"].item() == 400


def test_training_mode_is_compiled_where_it_is_meant() -> None:
    x = torch.randn(6, 4)
    always = nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)).eval()  # batch statistics in eval mode too
    torch.testing.assert_close(plait.compile(always, (x,))(x), always(x))
    with pytest.raises(errors.TrainingMode, match="'training': True"):
        plait.compile(nn.Dropout(0.5), (x,))
    dropped = plait.compile(nn.Dropout(0.5), (x,), options={"training": True})(x)
    assert set((dropped / x).round().unique().tolist()) == {0.0, 2.0}


# -- inputs that are written ------------------------------------------------------------------------------------------


def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    x.add_(1)
    return x * y


def test_inputs_that_share_memory_with_what_is_written_are_refused(tmp_path: Path) -> None:
    given = torch.randn(3, 2), torch.randn(3, 2)
    compiled = plait.compile(both, given)
    compiled.save(tmp_path / "m.plait", targets=TARGET)
    for model in (compiled, plait.load(tmp_path / "m.plait")):
        x = torch.randn(3, 2)
        with pytest.raises(errors.SharedMemory, match=r"'y' shares memory with 'x'"):
            model(x, x)
        with pytest.raises(errors.SharedMemory):
            memory = torch.randn(10)
            model(memory[:6].view(3, 2), memory[4:].view(3, 2))
        memory = torch.randn(12)
        x, y = memory[:6].view(3, 2), memory[6:].view(3, 2)
        expected = (x + 1) * y
        torch.testing.assert_close(model(x, y), expected)


def test_columns_of_one_matrix_do_not_share_memory() -> None:
    memory = torch.randn(3, 4)
    compiled = plait.compile(both, (memory[:, :2], memory[:, 2:]))
    expected = (memory[:, :2] + 1) * memory[:, 2:]
    torch.testing.assert_close(compiled(memory[:, :2], memory[:, 2:]), expected)
    with pytest.raises(errors.SharedMemory):
        compiled(memory[:, :2], memory[:, 1:3])


def test_the_state_is_no_input(tmp_path: Path) -> None:
    save(TiedBuffers().eval(), (torch.randn(4),), tmp_path / "m.plait")
    loaded = plait.load(tmp_path / "m.plait")
    with pytest.raises(errors.SharedMemory, match="'a'"):
        loaded(loaded.state["a"])


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line_shows_and_runs_it(tmp_path: Path) -> None:
    path = str(tmp_path / "m.plait")
    save(TiedBuffers().eval(), (torch.randn(4),), Path(path))
    run = CliRunner().invoke(main, ["inspect", path, "--json"], catch_exceptions=False)
    found = json.loads(run.stdout)
    assert found["state"] == ["a = b: float32[4]"] and found["inputs"] == ["x: float32[4] (written)"]
    command = ["run", path, "--random", "--compare", "graph", "--repeat", "2"]
    assert CliRunner().invoke(main, command, catch_exceptions=False).exit_code == 0
