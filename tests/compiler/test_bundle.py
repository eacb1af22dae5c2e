"""Bundles: a failure in a file, read back and seen again; and files that are refused."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from plait import errors
from plait.codegen.lowering import POINTWISE
from plait.compiler.debugging.bundle import BUNDLE, read_bundle, write_bundle
from plait.compiler.debugging.failure import Failure
from plait.compiler.debugging.stored import described, pass_data, pass_from, restored
from plait.compiler.debugging.subject import Subject
from plait.compiler.options import Options
from plait.ir import Builder, Graph, Rule, Var, parse_graph, pattern, structurally_equal
from plait.ir.rewrite import Match
from plait.passes.base import Context, Pass, option
from plait.passes.fold import Fold
from plait.runtime.archive import write_archive

TEXT = """
graph(level="tensor", symbols={"s0": (2, 64, 8)})
def f(x: "f32[s0,24]", i: "i64[4]"):
    w = plait.constant("w")
    few = plait.constant("few")
    a = aten.mm.default(x, w)
    t = aten.tanh.default(a)
    d = aten.mul.Tensor(t, 2)
    p = aten.index_select.default(d, 0, i)
    s = aten.mul.Tensor(few, 3)
    return (p, s)
"""


@dataclass(frozen=True)
class Scale(Pass):
    """Turns `x * 2` into `x * by`, or raises there."""

    name: ClassVar[str] = "scale"
    at: ClassVar[Any] = "split"
    by: float = option(2.0, doc="what to scale by; 0 raises")
    places: tuple[str, ...] = option((), doc="not used")

    def run(self, graph: Graph, ctx: Context) -> Graph:
        def scaled(m: Match, b: Builder) -> Any:
            if not self.by:
                raise RuntimeError("tripped")
            return b.call("aten.mul.Tensor", m["x"], self.by)

        return ctx.rewrite(graph, [Rule("scaled", pattern("aten.mul.Tensor", Var("x"), 2), scaled)])


@pytest.fixture
def wrong_tanh() -> Iterator[Callable[[], None]]:
    right = POINTWISE["aten.tanh.default"]
    POINTWISE["aten.tanh.default"] = POINTWISE["aten.sin.default"]
    yield lambda: POINTWISE.__setitem__("aten.tanh.default", right)
    POINTWISE["aten.tanh.default"] = right


def subject(*passes: Pass, **options: Any) -> Subject:
    torch.manual_seed(0)
    constants = {"w": torch.randn(24, 24) + 3, "few": torch.tensor([1.5, -2.0])}
    inputs = [torch.randn(8, 24), torch.tensor([0, 7, 3, 3])]
    return Subject.of(parse_graph(TEXT, constants), inputs, options={"passes": list(passes), **options})


def written(path: Path, one: Subject | None = None, **how: Any) -> Path:
    one = one or subject(Scale(0.0))
    failure = one.failure()
    assert failure is not None
    return write_bundle(path / "b.zip", one, failure, **how)


def test_a_failure_is_seen_again_and_seen_to_be_gone(wrong_tanh: Callable[[], None], tmp_path: Path) -> None:
    one = subject()
    path = written(tmp_path, one)
    bundle = read_bundle(path)
    again = bundle.subject()
    assert structurally_equal(replace(one, graph=one.graph.replace(constants={})).graph, again.graph.replace(constants={}))
    assert torch.equal(again.inputs[0], one.inputs[0]) and torch.equal(again.inputs[1], one.inputs[1])
    assert bundle.replay().same and "the same failure" in str(bundle.replay())
    wrong_tanh()
    gone = bundle.replay()
    assert gone.found is None and not gone.same and "does not fail any more" in str(gone)


def test_weights_are_in_it_only_when_asked_for(tmp_path: Path) -> None:
    one = subject(Scale(0.0))
    bundle = read_bundle(written(tmp_path, one))
    w, few = bundle.constants["w"], bundle.constants["few"]
    assert torch.equal(few, one.graph.constants["few"])
    assert not torch.equal(w, one.graph.constants["w"]) and w.shape == (24, 24)
    assert abs(float(w.mean()) - 3) < 0.2 and abs(float(w.std()) - 1) < 0.2
    with zipfile.ZipFile(tmp_path / "b.zip") as file:
        assert sum(i.file_size for i in file.infolist() if i.filename.endswith("tensors")) < 2000
    whole = read_bundle(written(tmp_path, one, weights=True))
    assert torch.equal(whole.constants["w"], one.graph.constants["w"])
    parameter = replace(one, inputs=(torch.nn.Parameter(one.inputs[0]), one.inputs[1]))
    kept = read_bundle(written(tmp_path, parameter))
    assert not torch.equal(kept.inputs[0], one.inputs[0]) and torch.equal(kept.inputs[1], one.inputs[1])


def test_the_passes_that_fail_come_along(tmp_path: Path) -> None:
    bundle = read_bundle(
        written(tmp_path, subject(Scale(0.0, ("a", "b")), disable_passes=["share"], **{"fold.max_elements": 7}))
    )
    options = bundle.subject().options
    assert options.passes == (Scale(0.0, ("a", "b")),) and options.disable_passes == ("share",)
    assert options.pass_options == (("fold", "max_elements", 7),)
    assert bundle.replay().same and bundle.failure.what == "P0205"
    other = replace(bundle, failure=Failure("raises", "P0103"))
    assert not other.replay().same and "another failure" in str(other.replay())
    assert {"plait", "torch", "machine", "go_on"} <= bundle.manifest.keys()
    assert "plait replay b.zip" in bundle.manifest["go_on"]


def test_a_broken_promise_is_seen_again(tmp_path: Path) -> None:
    one = subject(Scale(2.5))
    judged = replace(one, options=replace(one.options, verify="each-pass"))
    failure = judged.failure()
    assert failure is not None and failure.what == "P0413"
    assert read_bundle(write_bundle(tmp_path / "b.zip", judged, failure)).replay().same


def test_the_graph_after_the_failing_pass_is_there_too(tmp_path: Path) -> None:
    one = subject(Scale(2.5))
    failure = one.failure()
    step = next(s for s in one.build().history if s.pass_name == "scale")
    assert failure is not None
    bundle = read_bundle(write_bundle(tmp_path / "b.zip", one, failure, step=step))
    assert "2.5" in bundle.after and "2.5" not in bundle.text and bundle.manifest["failed_pass"] == "scale"


@pytest.mark.parametrize(
    "x",
    [
        3, None, True, 0.1, float("inf"),
        torch.randn(4, 6)[:, ::2], torch.randn(6, 4).t(), torch.ones(1).expand(5), torch.tensor(7), torch.randn(0, 3),
        torch.randn(3, dtype=torch.complex64), torch.randn(4).to(torch.bfloat16), torch.tensor([True, False]),
        torch.randint(0, 100, (64,)), torch.full((4,), float("-inf")), torch.rand(64) + 1,
    ],
    ids=lambda x: f"{x.dtype}-{list(x.shape)}" if isinstance(x, torch.Tensor) else str(x),  # the same in every process
)  # fmt: skip
@pytest.mark.parametrize("kept", [True, False])
def test_inputs_come_back_as_what_they_were(x: Any, kept: bool) -> None:
    spec = json.loads(json.dumps(described(x, 1, stored=kept), allow_nan=False))
    if not isinstance(x, torch.Tensor):
        assert restored(spec, None, "x") == x
        return
    held = torch.view_as_real(x) if x.is_complex() else x
    back = restored(spec, held if kept else None, "x")
    assert (back.shape, back.stride(), back.dtype) == (x.shape, x.stride(), x.dtype)
    if kept:
        assert torch.equal(back, x)
    elif x.dtype == torch.int64:
        assert x.min() <= back.min() and back.max() <= x.max()
    elif x.numel() == 64:
        assert float(back.min()) >= 1 and abs(float(back.mean() - x.mean())) < 0.2


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    failure = Failure("raises", "P0205")
    with pytest.raises(errors.CannotBundle, match="input of class object"):
        write_bundle(tmp_path / "b.zip", replace(subject(), inputs=(object(), 1)), failure)
    with pytest.raises(errors.CannotBundle, match="option places"):
        write_bundle(tmp_path / "b.zip", subject(Scale(1.0, (len,))), failure)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# -- passes by where they are imported from -----------------------------------------------------------------------------


def test_a_pass_is_found_where_its_class_is() -> None:
    data = pass_data(Scale(3.0, ("a",)))
    assert data["import"] == f"{__name__}:Scale"
    assert pass_from(json.loads(json.dumps(data))) == Scale(3.0, ("a",))
    assert "import" not in pass_data(Fold()) and pass_from(pass_data(Fold())) == Fold()


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("no_such_module_here:Scale", "No module named"),
        (f"{__name__}:NoSuch", "has no NoSuch"),
        (f"{__name__}:test_x.<locals>.Scale", "inside a function"),
        ("os:getcwd", "no pass"),
    ],
)
def test_a_pass_that_is_not_here_is_named(path: str, why: str) -> None:
    with pytest.raises(errors.PassNotFound, match=why):
        pass_from({"name": "scale", "import": path, "options": {}})


def test_a_pass_whose_module_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_on_import.py").write_text("raise OSError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(errors.PassNotFound, match="OSError: no licence"):
        pass_from({"name": "scale", "import": "breaks_on_import:Scale", "options": {}})


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without CUDA")
def test_an_input_on_a_device_that_is_not_here_is_named() -> None:
    one = torch.ones(2, 3)
    with pytest.raises(errors.DeviceNotAvailable, match="cuda:0"):
        restored({**described(one, 0, stored=True), "device": "cuda:0"}, one, "input 0")


def test_options_that_a_pass_has_no_more_are_named() -> None:
    with pytest.raises(errors.PassNotFound, match="gone"):
        pass_from({"name": "scale", "import": f"{__name__}:Scale", "options": {"gone": 1}})


@pytest.mark.parametrize("data", [None, {"name": 1, "options": {}}, {"name": "x", "import": "a b", "options": {}}])
def test_ill_formed_passes_are_damage(data: Any) -> None:
    with pytest.raises(errors.DamagedBundle):
        pass_from(data)


# -- files that are refused ---------------------------------------------------------------------------------------------


def rewritten(path: Path, **changes: Any) -> Path:
    """The bundle with entries of its manifest changed, checksums right again."""
    with zipfile.ZipFile(path) as file:
        manifest = json.loads(file.read(BUNDLE.manifest))
        members = {n: file.read(n) for n in file.namelist() if n != BUNDLE.manifest}
    form = replace(BUNDLE, version=changes.pop(BUNDLE.mark, BUNDLE.version))
    del manifest["members"]
    write_archive(path, {**manifest, **changes}, members, form)
    return path


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no zip")
    (tmp_path / "empty").touch()
    with zipfile.ZipFile(tmp_path / "zip", "w") as file:
        file.writestr("graph.txt", "x")
    write_archive(tmp_path / "artifact", {}, {})
    for name in ("text", "empty", "zip", "artifact", "missing"):
        with pytest.raises(errors.NotABundle):
            read_bundle(tmp_path / name)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.BundleVersion, match="version 2"):
        read_bundle(rewritten(written(tmp_path), plait_bundle=2))


def test_damage_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    places = [whole.index(part) for part in (b"def f(", b'"failure"', b"constants.safetensors")] + [len(whole) - 9]
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(errors.DamagedBundle):
            read_bundle(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(errors.DamagedBundle):
        read_bundle(path)


@pytest.mark.parametrize("name", ["../graph.txt", "/etc/graph.txt", "a/../../b", "a\\b"])
def test_paths_that_escape_are_refused(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO(written(tmp_path).read_bytes())
    with zipfile.ZipFile(buffer, "a") as file:
        file.writestr(zipfile.ZipInfo(name), "x")
    (tmp_path / "b.zip").write_bytes(buffer.getvalue())
    with pytest.raises(errors.DamagedBundle, match="below"):
        read_bundle(tmp_path / "b.zip")


@pytest.mark.parametrize(
    "changes",
    [
        {"level": "kernel"},
        {"name": 3},
        {"failure": None},
        {"failure": {"kind": "wrong", "what": "x", "op": "", "band": "high", "detail": ""}},
        {"inputs": None},
        {"inputs": [{"kind": "tensor"}]},
        {"inputs": [{"kind": "tensor", "dtype": "f32", "shape": [-1], "strides": [1], "stored": True}]},
        {"inputs": [{"kind": "tensor", "dtype": "f32", "shape": [8], "strides": [1], "stored": True, "device": "cpu"}]},
        {"constants": {"w": {"kind": "tensor", "dtype": "f3", "shape": [], "strides": [], "stored": False}}},
    ],
)
def test_ill_formed_manifests_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(errors.DamagedBundle):
        read_bundle(rewritten(written(tmp_path), **changes))


@pytest.mark.parametrize("changes", [{"inputs": []}, {"passes": 3}, {"options": []}])
def test_what_fits_no_graph_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    bundle = read_bundle(rewritten(written(tmp_path), **changes))
    with pytest.raises(errors.DamagedBundle):
        bundle.subject()


def test_an_option_that_is_not_known_is_named(tmp_path: Path) -> None:
    with pytest.raises(errors.UnknownOption):
        read_bundle(rewritten(written(tmp_path), options={"colour": 1})).subject()


def test_settings_of_this_process_do_not_leak_into_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path)
    monkeypatch.setenv("PLAIT_VERIFY", "each-pass")
    assert read_bundle(path).subject().options.verify == "off" == Options().verify
