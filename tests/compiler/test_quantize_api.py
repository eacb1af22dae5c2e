"""`plait.quantize` from end to end: planning, resuming, dtypes, sources, state, saving; its passes in `plait.compile`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.compiler.debugging.interpret import interpret
from plait.compiler.quantize.measure import measured
from plait.compiler.quantize.plan import Budget, error_of
from plait.errors import (
    BadOption,
    BudgetCannotBeMet,
    CannotReplace,
    CannotResume,
    CannotWriteCheckpoint,
    NoQuantizedKernel,
    PassFailed,
)
from plait.formats import QuantizedType
from plait.ir import TensorType
from torch import Tensor, nn
from torch.nn import functional as F

K = 64


class Block(nn.Module):
    """Norm, gate and up, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(K)
        self.gate, self.up, self.down = nn.Linear(K, 96), nn.Linear(K, 96), nn.Linear(96, K)
        self.head = nn.Linear(K, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


def seeded(seed: int = 0, make: Callable[[], nn.Module] = Block) -> nn.Module:
    torch.manual_seed(seed)
    return make().eval()


def data(seed: int = 0, *shape: int, batches: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(*(shape or (2, 12, K)), generator=g).to(dtype) for _ in range(batches)]


def quantize(model: Any, calib: Any, scheme: str = "awq-w4g32", **how: Any) -> plait.QuantizedModel:
    return plait.quantize(model, calib, scheme=scheme, **{"want": "any", **how})


def plain(q: plait.QuantizedModel, *xs: Any) -> Tensor:
    """What the quantized graph computes by references."""
    return interpret(q.graph, xs)[0]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).square().mean() / want.double().square().mean())


@pytest.fixture(autouse=True)
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times of layers say nothing here."""
    monkeypatch.setattr("plait.compiler.quantize.api.microseconds", lambda rows: lambda *_: {})
    monkeypatch.setattr("plait.compiler.quantize.api.measured", lambda rows: lambda *_: "")


# -- planning -----------------------------------------------------------------------------------------------------------

FORMATS = ("w2g32", "w3g32", "w4g32", "w8g32")


@pytest.mark.parametrize("budget", ["bytes=20KB", "bytes=12KiB", "bytes=30%", "bytes=1MB"])
def test_a_budget_of_bytes_is_kept(budget: str) -> None:
    model, calib = seeded(), data()
    q = quantize(model, calib, budget=budget, formats=FORMATS)
    floats = sum(p.nbytes for p in model.parameters() if p.ndim == 2)
    limit = {"bytes=20KB": 20e3, "bytes=12KiB": 12 * 1024, "bytes=30%": 0.3 * floats, "bytes=1MB": 1e6}[budget]
    assert q.plan is not None
    held = {layer.name: layer.nbytes for layer in q.layers}
    assert sum(held.get(n, m.weight.nbytes) for n, m in model.named_modules() if isinstance(m, nn.Linear)) <= limit
    assert q.plan.error == pytest.approx(error_of(q.step, [(x,) for x in calib]))
    assert ("head" in {one.name for one in q.skipped}) is (budget == "bytes=1MB")
    text = str(q.plan)
    assert all(name in text for name in ("gate", "up", "down", "head")) and text.count("*") == 4


def test_more_bytes_never_cost_more_error() -> None:
    model, calib = seeded(), data()
    errors = [
        quantize(model, calib, "rtn-w4g32", budget=f"bytes={n}KB", formats=FORMATS).plan.error for n in (9, 14, 20, 90)
    ]  # type: ignore[union-attr]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


@pytest.mark.parametrize("limit", [0.5, 0.05, 0.005, 1e-6])
@pytest.mark.parametrize("scheme", ["rtn-w4g32", "awq-w4g32"])
def test_a_budget_of_error_is_kept(limit: float, scheme: str) -> None:
    model, calib = seeded(), data()
    q = quantize(model, calib, scheme, budget=f"error={limit}", formats=FORMATS)
    want = torch.cat([model(x) for x in calib])
    got = torch.cat([plain(q, x) for x in calib])
    assert relative(got, want) ** 0.5 <= limit * 1.001
    if limit == 0.5:
        assert {layer.format.bits for layer in q.layers} == {2}


def test_budgets_that_cannot_be_met() -> None:
    with pytest.raises(BudgetCannotBeMet, match="smallest formats"):
        quantize(seeded(), data(), budget="bytes=1KB", formats=FORMATS)


@pytest.mark.parametrize(
    "text", ["", "error", "error=", "error=1MB", "bytes=x", "time=3", "bytes=-3", "error=0.1.2", "error=5%"]
)
def test_budgets_that_are_not_written_as_such(text: str) -> None:
    with pytest.raises(BadOption):
        Budget.of(text)


@pytest.mark.parametrize("text", ["error=0.05", "bytes=4e+07", "bytes=30%", "bytes=1048576"])
def test_budgets_as_text(text: str) -> None:
    assert str(Budget.of(text)) in (text, "bytes=1.04858e+06")


def test_layers_of_one_name_at_two_places_get_what_was_planned() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.inner = nn.Linear(K, K), nn.ModuleDict({"a": nn.Linear(K, K)})

        def forward(self, x: Tensor) -> Tensor:
            return self.a(F.relu(self.inner["a"](x) * 1000))

    q = quantize(seeded(0, Two), data(), budget="bytes=6KB", formats=FORMATS)
    assert q.plan is not None
    assert {layer.name: layer.format for layer in q.layers} == dict(q.plan.formats)


# -- resuming -----------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stops_after(n: int) -> Callable[[int, int, str], None]:
    def progress(done: int, of: int, what: str) -> None:
        if done == n:
            raise Stop

    return progress


def searches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The groups that are searched from now on, by the names of their layers."""
    from plait.passes.quantize.search import GroupSearch

    run, seen = GroupSearch.run, []

    def counted(self: Any, method: Any) -> Any:
        seen.append(tuple(one.name for one in self.wanted))
        return run(self, method)

    monkeypatch.setattr(GroupSearch, "run", counted)
    return seen


def same(a: plait.QuantizedModel, b: plait.QuantizedModel) -> bool:
    return a.layers == b.layers and a.graph.constants.keys() == b.graph.constants.keys() and all(
        torch.equal(t, b.graph.constants[name]) for name, t in a.graph.constants.items()
    )  # fmt: skip


def test_an_interrupted_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calib = seeded(), data()
    whole = quantize(model, calib, "awq+gptq-w4g32")
    with pytest.raises(PassFailed) as error:
        quantize(model, calib, "awq+gptq-w4g32", resume=tmp_path, progress=stops_after(2))
    assert isinstance(error.value.__cause__, Stop)
    seen = searches(monkeypatch)
    heard: list[tuple[int, int, str]] = []
    q = quantize(model, calib, "awq+gptq-w4g32", resume=tmp_path, progress=lambda *what: heard.append(what))
    assert seen == [("head",)] and same(q, whole)
    assert [(done, of) for done, of, _ in heard] == [(1, 3), (2, 3), (3, 3)]
    quantize(model, calib, "awq+gptq-w4g32", resume=str(tmp_path))
    assert seen == [("head",)]


def test_a_folder_of_another_call_is_refused(tmp_path: Path) -> None:
    model, calib = seeded(), data()
    quantize(model, calib, resume=tmp_path)
    others: list[tuple[Any, Any, dict[str, Any]]] = [
        (seeded(1), calib, {}),
        (model, data(1), {}),
        (model, calib[:1], {}),
        (model, calib, {"scheme": "awq-w4g64"}),
        (model, calib, {"scheme": "rtn-w4g32"}),
        (model, calib, {"ignore": ["head"]}),
        (model, calib, {"layers": ["head=w8"]}),
        (model, calib, {"budget": "bytes=20KB"}),
    ]
    for other, batches, how in others:
        with pytest.raises(CannotResume, match="begun for another"):
            quantize(other, batches, resume=tmp_path, **how)
    assert same(quantize(model, calib, resume=tmp_path), quantize(model, calib))


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "gone", "other"])
def test_damaged_files_are_done_again(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calib = seeded(), data()
    whole = quantize(model, calib, resume=tmp_path)
    files = sorted(tmp_path.glob("group-*"))
    assert len(files) == 3
    content = files[0].read_bytes()
    if damage == "gone":
        files[0].unlink()
    elif damage == "flipped":
        files[0].write_bytes(content[:-5] + bytes([content[-5] ^ 64]) + content[-4:])
    else:
        files[0].write_bytes({"cut": content[: len(content) // 2], "empty": b"", "other": b"x" * 100}[damage])
    seen = searches(monkeypatch)
    assert same(quantize(model, calib, resume=tmp_path), whole) and len(seen) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"mark": 1}'])
def test_a_damaged_mark_is_refused(content: str, tmp_path: Path) -> None:
    quantize(seeded(), data(), resume=tmp_path)
    (tmp_path / "call.json").write_text(content)
    with pytest.raises(CannotResume):
        quantize(seeded(), data(), resume=tmp_path)


def test_a_folder_that_cannot_be_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotResume):
        quantize(seeded(), data(), resume=tmp_path / "file")


def test_a_plan_resumes(tmp_path: Path) -> None:
    """Groups that were searched in other formats, on the way to a budget, are not taken for those that were chosen."""
    model, calib = seeded(), data()
    how = {"scheme": "awq-w4g32", "budget": "error=0.02", "formats": FORMATS}
    whole = quantize(model, calib, **how)
    first = quantize(model, calib, resume=tmp_path, **how)
    again = quantize(model, calib, resume=tmp_path, **how)
    assert same(first, whole) and same(again, whole)
    assert relative(plain(again, calib[0]), model(calib[0])) ** 0.5 < 0.04
    with pytest.raises(CannotResume):
        quantize(model, calib, resume=tmp_path, **{**how, "formats": ("w8g32",)})


# -- dtypes, sizes, sources, state ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", ["awq+gptq-w4g32", "w8a8"])
def test_dtypes(dtype: torch.dtype, scheme: str) -> None:
    model, calib = seeded().to(dtype), data(dtype=dtype)
    q = quantize(model, calib, scheme)
    got, want = q(calib[0]), model(calib[0])
    assert got.dtype == dtype and len(q.layers) == 4
    assert relative(got, plain(q, calib[0])) < 1e-4 and relative(got, want) < 0.03
    assert relative(q.module()(calib[0]), got) < 1e-4
    assert all(layer.float_bytes == dtype.itemsize * layer.type.rows * layer.type.columns for layer in q.layers)


def test_symbolic_sizes() -> None:
    model, calib = seeded(), [*data(0, 2, 12, K), *data(1, 5, 7, K)]
    sizes = {"x": {0: torch.export.Dim("b"), 1: torch.export.Dim("t")}}
    q = quantize(model, calib, dynamic_shapes=sizes)
    assert all(layer.rows_seen == 2 * 24 + 2 * 35 for layer in q.layers)
    for shape in ((3, 4, K), (2, 30, K)):
        (x,) = data(2, *shape, batches=1)
        torch.testing.assert_close(q(x), plain(q, x), rtol=1e-3, atol=1e-4)
        assert relative(q(x), model(x)) < 0.03


class Counter(nn.Module):
    """A model that writes a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(K, K)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.a(x) * self.calls


def test_state_is_written_by_calls_and_not_by_calibration() -> None:
    model, calib = seeded(0, Counter), data()
    q = quantize(model, calib, "rtn-w8g32")
    assert model.calls == 0
    made, twin = q.module(), seeded(0, Counter)
    for _ in range(3):
        want = twin(calib[0])
        assert relative(q(calib[0]), want) < 1e-3 and relative(made(calib[0]), want) < 1e-3
    assert model.calls == 0 and made.calls == 3


@pytest.mark.parametrize("how", ["program", "file", "function"])
def test_sources(how: str, tmp_path: Path) -> None:
    model, calib = seeded(), data()
    expected = quantize(model, calib)
    program = torch.export.export(model, (calib[0],))
    source: Any = program
    if how == "file":
        source = tmp_path / "model.pt2"
        torch.export.save(program, source)
    elif how == "function":
        source = lambda x: model(x)  # noqa: E731
    q = quantize(source, calib)
    assert [layer.loss for layer in q.layers] == [layer.loss for layer in expected.layers]
    torch.testing.assert_close(q(calib[0]), expected(calib[0]), rtol=1e-4, atol=1e-5)
    with pytest.raises(CannotReplace):
        q.module()


def test_keywords() -> None:
    model, calib = seeded(), data()
    q = quantize(model, [{"x": x} for x in calib])
    torch.testing.assert_close(q(x=calib[0]), quantize(model, calib)(calib[0]))


def test_want_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calib = seeded(), data()
    monkeypatch.setattr(
        "plait.compiler.quantize.api.measured", lambda rows: lambda x, kind, dynamic: "slow" if kind.rows == 32 else ""
    )
    assert {layer.name for layer in quantize(model, calib, want="faster").layers} == {"gate", "up", "down"}
    assert "slow" in str(quantize(model, calib, want="faster"))
    assert len(quantize(model, calib, want="smaller").layers) == 4
    assert len(quantize(model.half(), data(dtype=torch.float16), "rtn-w8g1", want="smaller").layers) == 0
    assert "no layer is quantized" in str(quantize(model, data(dtype=torch.float16), "rtn-w8g1", want="smaller"))


def test_layers_without_kernels_are_not_faster() -> None:
    from plait.compiler.quantize.measure import measured
    from plait.formats import QuantizedType
    from plait.ir import TensorType

    kind = QuantizedType((32, 64), 4, 32)
    assert "float64" in measured((1,))(TensorType((2, 64), torch.float64), kind, False) or "f64" in measured((1,))(
        TensorType((2, 64), torch.float64), kind, False
    )


# -- modules, artifacts, checkpoints ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["awq-w4g32", "rtn-w3g16", "w8a8", "awq+gptq-w8g64-sym"])
def test_the_module_computes_the_same_and_the_original_stays(scheme: str) -> None:
    model, calib = seeded(), data()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    q = quantize(model, calib, scheme)
    made = q.module()
    (x,) = data(9, batches=1)
    torch.testing.assert_close(made(x), plain(q, x), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(q(x), plain(q, x), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert type(model.get_submodule("gate")) is nn.Linear and not any(isinstance(m, nn.Linear) for m in made.modules())
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.slow
def test_an_artifact_gives_the_same_numbers(tmp_path: Path) -> None:
    model, calib = seeded(), data()
    for scheme in ("awq-w4g32", "w8a8"):
        q = quantize(model, calib, scheme)
        q.save(tmp_path / "model.plait")
        assert torch.equal(plait.load(tmp_path / "model.plait")(calib[0]), q(calib[0]))


@pytest.mark.parametrize("kind", ["awq", "compressed"])
def test_checkpoints_round_trip(kind: str, tmp_path: Path) -> None:
    model, calib = seeded(), data()
    q = quantize(model, calib, "awq-w4g32", ignore=["head"])
    assert any(layer.route == "constants" for layer in q.layers)
    (q.save_awq if kind == "awq" else q.save_compressed)(tmp_path / "out")
    other = seeded(5)
    plait.load_quantized(other, tmp_path / "out")
    torch.testing.assert_close(other(calib[0]), q.module()(calib[0]), rtol=2e-3, atol=2e-3)


def test_the_report_as_data() -> None:
    q = quantize(seeded(), data(), layers=["head=float"])
    found = json.loads(json.dumps(q.as_json(), default=str))
    assert [layer["name"] for layer in found["layers"]] == ["gate", "up", "down"] or len(found["layers"]) == 3
    assert found["bytes"] == q.nbytes == sum(layer["bytes"] for layer in found["layers"])
    assert found["skipped"] == [{"name": "head", "why": "it stays float as planned"}]
    assert 4 < found["bits_per_weight"] < 5.2


# -- the passes in plait.compile ------------------------------------------------------------------------------------------


def test_passes_in_compile_and_the_debugging_api() -> None:
    model, calib = seeded(), data()
    compiled = plait.compile(model, calib[0], passes=["rtn:bits=4,group=32,want=any"], options={"calibration": calib})
    torch.testing.assert_close(
        compiled(calib[0]), plain(quantize(model, calib, "rtn-w4g32"), calib[0]), rtol=1e-3, atol=1e-4
    )
    step = compiled.step("rtn")
    assert step.changed and step.fired == {"w4g32": 4} and step.numerics.kind == "approximate"
    assert "quantized_linear" in compiled.diff("rtn")
    assert relative(compiled.run_until("rtn")(calib[0]), model(calib[0])) < 0.03
    assert compiled.numerics(calib[0])


@pytest.mark.parametrize("verify", ["structure", "each-pass"])
@pytest.mark.parametrize("one", ["rtn:group=32,want=any", "awq:group=32,want=any", "w8a8:want=any"])
def test_passes_are_verified(one: str, verify: str) -> None:
    model, calib = seeded(), data()
    compiled = plait.compile(model, calib[0], passes=[one], options={"calibration": calib, "verify": verify})
    assert relative(compiled(calib[0]), model(calib[0])) < 0.03


def test_an_error_budget_undoes_what_overdraws() -> None:
    model, calib = seeded(), data()
    for one, limit, kept in (("rtn:bits=2,group=32,want=any", 0.01, False), ("rtn:bits=8,group=32,want=any", 0.05, True)):
        compiled = plait.compile(model, calib[0], options={"max_rel_err": limit, "passes": [one], "calibration": calib})
        step = compiled.step("rtn")
        assert bool(step.rolled_back) is not kept and step.changed is kept
        if not kept:
            torch.testing.assert_close(compiled(calib[0]), model(calib[0]), rtol=1e-4, atol=1e-5)


def test_missing_kernels_may_be_refused() -> None:
    model, calib = seeded(), data()
    options = {"strict_kernels": True}
    with pytest.raises(NoQuantizedKernel, match="multiples of 32"):
        quantize(model, calib, "rtn-w4g16", options=options)(calib[0])
    with pytest.raises(NoQuantizedKernel):
        plait.compile(model, calib[0], passes=["rtn:group=16,want=any"], options=options)
    q = quantize(model, calib, "rtn-w4g32", options=options)
    assert relative(q(calib[0]), model(calib[0])) < 0.03


def near(build: Any, x: Tensor, want: Tensor) -> bool:
    return relative(build(x)[0], want) < 1e-3


def test_bisection_finds_the_pass() -> None:
    model, calib = seeded(), data()
    one = ["rtn:bits=2,group=32,want=any"]
    want = model(calib[0])
    found = plait.bisect(
        model, calib[0], passes=one, options={"calibration": calib}, check=lambda build: near(build, calib[0], want)
    )
    assert "rtn" in str(found)


def test_scales_that_only_constants_take(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()  # no route through a gelu
    with torch.no_grad():
        model[0].weight[:4] *= 30
    batches = [torch.randn(32, 64) for _ in range(2)]
    free = plait.quantize(model, batches, scheme="awq-w4g64", want="any")
    assert any(layer.route.startswith("at run time") for layer in free.layers)
    kept = plait.quantize(model, batches, scheme="awq-w4g64", want="any", constants_only=True)
    assert all(layer.route in ("", "constants") for layer in kept.layers)
    kept.save_awq(tmp_path / "checkpoint")
    with pytest.raises(CannotWriteCheckpoint):
        free.save_awq(tmp_path / "other")


def test_nothing_is_called_faster_where_nothing_is_measured() -> None:
    kind = QuantizedType((64, 64), 4, 32)
    assert "nothing is measured on cuda:0" in measured()(TensorType((2, 64), torch.float32, "cuda:0"), kind, False)
    assert "f64" in measured()(TensorType((2, 64), torch.float64), kind, False)
