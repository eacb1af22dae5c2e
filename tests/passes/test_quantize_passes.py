"""`plait.quantize` and the passes `rtn`, `awq`, `w8a8`: what rounding costs, what is refused, planning, resuming, saving."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from plait.compiler.debugging.interpret import interpret
from plait.errors import (
    BadCalibration,
    BadOption,
    BadPassOption,
    BadQuantizedType,
    BadScheme,
    CannotReplace,
    GroupDoesNotDivide,
    NoLayerMatches,
    PassFailed,
)
from plait.formats import QuantizedType
from plait.formats.ops import quantize_rows
from plait.passes.quantize.scheme import Format, Scheme
from torch import Tensor, nn
from torch.nn import functional as F

K = 64


class Attention(nn.Module):
    """A block: norm, grouped heads, gate and up, residuals."""

    def __init__(self, k: int = K, heads: int = 4, own: int = 2) -> None:
        super().__init__()
        self.norm, self.post = nn.RMSNorm(k), nn.RMSNorm(k)
        self.heads = heads
        self.q, self.o = nn.Linear(k, k), nn.Linear(k, k, bias=False)
        self.k, self.v = nn.Linear(k, k * own // heads), nn.Linear(k, k * own // heads)
        self.gate, self.up, self.down = nn.Linear(k, 96), nn.Linear(k, 96), nn.Linear(96, k)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (layer(y).unflatten(-1, (-1, K // self.heads)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))
        y = self.post(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Mlp(nn.Module):
    def __init__(self, k: int = K, hidden: int = 96, n: int = 32, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(k, hidden, bias=bias), nn.Linear(hidden, n, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


def seeded(seed: int, make: Callable[..., nn.Module] = Mlp, **how: Any) -> nn.Module:
    torch.manual_seed(seed)
    return make(**how).eval()


def data(
    seed: int, *shape: int, batches: int = 3, outliers: bool = False, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = shape or (2, 16, K)
    scale = torch.ones(shape[-1])
    if outliers:
        scale[torch.randperm(shape[-1], generator=g)[:3]] = 40.0
    return [(torch.randn(*shape, generator=g) * scale).to(dtype) for _ in range(batches)]


def quantize(model: Any, calib: Any, scheme: str = "rtn-w4g32", **how: Any) -> plait.QuantizedModel:
    return plait.quantize(model, calib, scheme=scheme, **{"want": "any", **how})


def plain(q: plait.QuantizedModel, x: Tensor) -> Tensor:
    """What the quantized graph computes by references."""
    return interpret(q.graph, [x])[0]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).square().mean() / want.double().square().mean())


# -- rounding costs no more than rounding to nearest ----------------------------------------------------------------------


SCHEMES = ("awq-w4g32", "awq-w3g64-sym", "awq+gptq-w4g32", "gptq-w3g32", "gptq-w2g0")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("outliers", [False, True])
def test_the_loss_never_exceeds_that_of_rounding_to_nearest(scheme: str, outliers: bool) -> None:
    for seed in range(4):
        model, calib = seeded(seed, Attention), data(seed, outliers=outliers)
        q = quantize(model, calib, scheme)
        assert len(q.layers) == 7
        for layer in q.layers:
            assert 0 < layer.loss <= layer.nearest_loss, f"seed {seed}: {layer}"
            assert layer.rows_seen == 96 and not layer.note.startswith("calibration")


@pytest.mark.parametrize("scheme", ["awq-w4g32", "awq-w3g64-sym", "awq+gptq-w3g32", "gptq-w3g32"])
def test_the_losses_are_those_of_the_graphs(scheme: str) -> None:
    """A model of one group: what is reported, of both roundings, is what the graphs compute."""
    for seed in range(4):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.LayerNorm(K), nn.Linear(K, 48)).eval()
        with torch.no_grad():
            model[0].weight.copy_(torch.rand(K) * torch.where(torch.arange(K) % 16 == 0, 30.0, 1.0))
        calib = data(seed)
        q = quantize(model, calib, scheme)
        form = scheme.partition("-")[2]
        (layer,), (nearest,) = q.layers, quantize(model, calib, f"rtn-{form}").layers
        want = torch.cat([model(x) for x in calib])
        assert relative(torch.cat([plain(q, x) for x in calib]), want) == pytest.approx(layer.loss, rel=0.02), f"seed {seed}"
        assert layer.nearest_loss == pytest.approx(nearest.loss) and nearest.loss == nearest.nearest_loss


def test_awq_helps_where_channels_stand_out() -> None:
    model, calib = seeded(1, Attention), data(1)
    with torch.no_grad():
        model.get_parameter("norm.weight")[::16] = 30.0
    q = quantize(model, calib, "awq-w3g32", targets=["q", "k", "v"])
    assert all(layer.loss < 0.7 * layer.nearest_loss and layer.route == "constants" for layer in q.layers)


@pytest.mark.parametrize("compensate", [False, True])
def test_bytes_by_bytes(compensate: bool) -> None:
    for seed in range(3):
        model, calib = seeded(seed, Attention), data(seed)
        step_of = plait.compile(
            model, calib[0], passes=[f"w8a8:want=any,compensate={compensate}"], options={"calibration": calib}
        )
        got, want = step_of(calib[0]), model(calib[0])
        assert relative(got, want) < 1e-3, f"seed {seed}"
    q = quantize(seeded(0, Attention), data(0), "w8a8")
    assert all(
        str(layer.format) == "w8a8" and layer.type.layout == "bytes" and layer.loss <= layer.nearest_loss
        for layer in q.layers
    )


# -- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", ["", "-sym"])
def test_numbers_are_those_of_fake_quantization_by_hand(bits: int, sym: str) -> None:
    model, (x,) = seeded(bits), data(bits, batches=1)
    q = quantize(model, [x], f"rtn-w{bits}g32{sym}")
    by_hand = seeded(bits)
    with torch.no_grad():
        for layer in (by_hand.a, by_hand.b):
            grouped = layer.weight.unflatten(1, (-1, 32))
            if sym:
                scale = (grouped.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)).half().float()
                codes = (grouped / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
            else:
                low, high = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
                scale = ((high - low) / (2**bits - 1)).half().float()
                zero = (-low / scale).round()
                codes = ((grouped / scale).round() + zero).clamp(0, 2**bits - 1) - zero
            layer.weight.copy_((codes * scale).flatten(1))
    torch.testing.assert_close(plain(q, x), by_hand(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q(x), by_hand(x), rtol=1e-3, atol=1e-4)
    assert [str(layer.type).partition("[")[0] for layer in q.layers] == [f"{'i' if sym else 'u'}{bits}g32"] * 2


def test_bytes_are_those_by_hand() -> None:
    model, (x,) = seeded(0, bias=True), data(0, batches=1)
    q = quantize(model, [x], "w8a8")

    def layer(one: nn.Linear, x: Tensor) -> Tensor:
        scale = one.weight.abs().amax(1, keepdim=True) / 127
        codes, rows = quantize_rows(x)
        return (codes.double() @ (one.weight / scale).round().double().t()).float() * rows * scale.flatten() + one.bias

    torch.testing.assert_close(q(x), layer(model.b, F.relu(layer(model.a, x))), rtol=1e-4, atol=1e-4)


# -- formats ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "asked", "used"),
    [(576, 128, 96), (130, 128, 65), (97, 64, 1), (96, 64, 32), (64, 128, 64), (40, 32, 20), (40, 0, 40), (256, 128, 128)],
)
def test_a_group_that_does_not_divide_gives_way_to_the_next(columns: int, asked: int, used: int) -> None:
    kind = Format(4, asked).type_for(8, columns)
    assert kind.group == used and kind.layout == ("panels" if columns % 32 == 0 and used % 32 == 0 else "rows")


def test_a_group_that_does_not_divide_is_noted() -> None:
    model, calib = seeded(0, k=40, hidden=96), data(0, 2, 16, 40)
    q = quantize(model, calib, "rtn-w4g64")
    notes = {layer.name: layer.note for layer in q.layers}
    assert "groups of 40" in notes["a"] and "groups of 32" in notes["b"]
    assert q.layers[0].type.layout == "rows" and q.layers[1].type.layout == "panels"
    torch.testing.assert_close(q(calib[0]), plain(q, calib[0]), rtol=1e-4, atol=1e-4)


def test_a_group_that_does_not_divide_is_no_type() -> None:
    with pytest.raises(GroupDoesNotDivide, match="32, 96"):
        QuantizedType((8, 96), 4, 40, layout="rows")


@pytest.mark.parametrize(
    "what", [{"bits": 1}, {"bits": 9}, {"shape": (4,)}, {"scale": "f8"}, {"layout": "tiles"}, {"shape": (0, 32)}]
)
def test_types_that_do_not_exist(what: dict[str, Any]) -> None:
    with pytest.raises(BadQuantizedType):
        QuantizedType(**{"shape": (8, 32), "group": 32, **what})


@pytest.mark.parametrize(
    "text", ["", "awq", "awq-", "awq-w1", "awq-w9g128", "int4", "awq-w4g128-asym", "w4g128", "spin-w4g128", "w8a8-sym"]
)
def test_schemes_that_do_not_exist(text: str) -> None:
    with pytest.raises(BadScheme):
        Scheme.of(text)
    with pytest.raises(BadScheme):
        plait.quantize(seeded(0), data(0), scheme=text)


@pytest.mark.parametrize("text", ["awq-w4g128", "rtn-w8g64-sym", "awq+gptq-w3g32", "w8a8", "gptq-w2"])
def test_schemes_as_text(text: str) -> None:
    assert str(Scheme.of(text)) == text


def test_formats_of_single_layers() -> None:
    model, calib = seeded(0, Attention), data(0)
    q = quantize(model, calib, layers=["down=w8g32", "re:[qk]$=w3g32-sym", "v=float"])
    held = {layer.name: str(layer.format) for layer in q.layers}
    assert held == {"q": "w3g32-sym", "k": "w3g32-sym", "o": "w4g32", "gate": "w4g32", "up": "w4g32", "down": "w8g32"}
    assert [(one.name, one.why) for one in q.skipped] == [("v", "it stays float as planned")]


def test_a_full_name_comes_before_the_last_part_of_another() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.inner = nn.Linear(K, K), nn.ModuleDict({"a": nn.Linear(K, K)})

        def forward(self, x: Tensor) -> Tensor:
            return self.inner["a"](F.relu(self.a(x)))

    q = quantize(seeded(0, Two), data(0), layers=["a=w8g32", "inner.a=w2g32"])
    assert {layer.name: str(layer.format) for layer in q.layers} == {"a": "w8g32", "inner.a": "w2g32"}


@pytest.mark.parametrize("text", ["down", "down=w9", "=w4g32x", "down=w4g"])
def test_formats_of_single_layers_that_are_not_written_as_such(text: str) -> None:
    with pytest.raises((BadPassOption, PassFailed), match=re.escape("NAME=FORMAT")):
        quantize(seeded(0, Attention), data(0), layers=[text])


def test_targets_and_ignore() -> None:
    model, calib = seeded(0, Attention), data(0)
    assert {layer.name for layer in quantize(model, calib, targets=["re:[qkv]$", "o"], ignore=["k"]).layers} == {
        "q",
        "v",
        "o",
    }
    with pytest.raises(NoLayerMatches):
        quantize(model, calib, targets=["lm_head"])


def test_a_wish_that_does_not_exist() -> None:
    with pytest.raises(BadOption):
        quantize(seeded(0), data(0), want="cheap")


# -- layers and weights that are special ----------------------------------------------------------------------------------


def test_a_weight_used_twice_is_held_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x))) + self.a(x.sin())

    model, calib = seeded(0, Twice), data(0)
    for scheme in ("rtn-w4g32", "awq-w4g32", "w8a8"):
        q = quantize(model, calib, scheme)
        codes = [name for name in q.graph.constants if "codes" in name]
        assert len(codes) == 1, codes
        assert relative(plain(q, calib[0]), model(calib[0])) < 0.03
        assert all(layer.loss == layer.nearest_loss for layer in q.layers)


def test_weights_of_one_module_are_held_apart() -> None:
    class Ffn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Parameter(torch.randn(K, K)), nn.Parameter(torch.randn(K, K))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.relu(F.linear(x, self.first)), self.second)

    model, calib = seeded(0, lambda: nn.Sequential(Ffn())), data(0)
    q = quantize(model, calib, "rtn-w8g32")
    assert {layer.name for layer in q.layers} == {"0.first", "0.second"}
    assert relative(plain(q, calib[0]), model(calib[0])) < 1e-4
    with pytest.raises(CannotReplace):
        q.module()


def test_one_layer_on_two_parts_of_a_value_may_be_kept(tmp_path: Path) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n, self.a = nn.LayerNorm(K), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            y = self.n(x)
            return torch.cat([self.a(y[:, :4]), self.a(y[:, 4:])], 1)

    model, calib = seeded(0, Parts), data(0)
    q = quantize(model, calib, "awq-w4g32", resume=tmp_path)
    assert relative(plain(q, calib[0]), model(calib[0])) < 0.03
    again = quantize(model, calib, "awq-w4g32", resume=tmp_path)
    assert torch.equal(plain(again, calib[0]), plain(q, calib[0]))


def test_layers_in_branches_stay_float() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.n, self.a, self.b = nn.LayerNorm(K), nn.Linear(K, K), nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(self.n(x))
            return torch.cond(x.sum() > 0, lambda t: self.b(t), lambda t: self.a(t) * self.n.weight, (y,))

    model, calib = seeded(0, Branches), data(0)
    q = quantize(model, calib, "awq-w4g32")
    assert [layer.name for layer in q.layers] == ["a"]
    for x in (calib[0].abs(), -calib[0].abs()):
        assert relative(plain(q, x), model(x)) < 0.03


class Experts(nn.Module):
    """Each row goes to the expert of its largest score."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.n, self.router = nn.RMSNorm(K), nn.Linear(K, experts)
        self.experts = nn.ModuleList(nn.Linear(K, K) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        best = self.router(y).argmax(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            (row,) = torch.where(best == i)
            out = out.index_add(0, row, expert(y[row]).view(row.shape[0], K))
        return out


@pytest.mark.parametrize("scheme", ["rtn-w4g32", "awq-w4g32", "awq+gptq-w4g32", "w8a8"])
def test_experts_that_calibration_never_reached(scheme: str) -> None:
    model, calib = seeded(0, Experts), data(0, 40, K)
    with torch.no_grad():
        model.router.bias[1] = -1e9
    q = quantize(model, calib, scheme, ignore=["router"])
    by_name = {layer.name: layer for layer in q.layers}
    unseen = by_name["experts.1"]
    assert unseen.rows_seen == 0 and "rounded to nearest" in unseen.note and not unseen.clipped
    others = by_name["experts.0"], by_name["experts.2"]
    assert all(not other.note and 0 < other.loss <= other.nearest_loss for other in others)
    assert by_name["experts.0"].rows_seen + by_name["experts.2"].rows_seen == 120
    assert relative(plain(q, calib[0]), model(calib[0])) < 0.03


def test_a_router_may_be_quantized_with_its_experts() -> None:
    """Rounding the router sends some rows elsewhere: what the experts read changes with it."""
    model, calib = seeded(0, Experts), data(0, 40, K)
    for scheme in ("rtn-w2g32", "awq-w3g32"):
        q = quantize(model, calib, scheme)
        assert {layer.name for layer in q.layers} == {"router", "experts.0", "experts.1", "experts.2"}
        assert all(layer.loss <= layer.nearest_loss for layer in q.layers)
        assert plain(q, calib[0]).shape == calib[0].shape


# -- bad calibration ----------------------------------------------------------------------------------------------------


def nan() -> Tensor:
    x = data(0, batches=1)[0]
    x[0, 0, 0] = torch.nan
    return x


BAD: dict[str, Callable[[], Any]] = {
    "none": list,
    "a tensor": lambda: data(0)[0],
    "a dict": lambda: {"x": data(0)[0]},
    "nothing": lambda: None,
    "an empty batch": lambda: [*data(0), data(0)[0][:0]],
    "NaN": lambda: [*data(0), nan()],
    "NaN first": lambda: [nan(), *data(0)],
    "infinite": lambda: [*data(0), data(0)[0] / 0],
    "another shape": lambda: [*data(0), data(0)[0][:, :3]],
    "another rank": lambda: [*data(0), data(0)[0][0]],
    "another dtype": lambda: [*data(0), data(0)[0].double()],
    "another count": lambda: [*data(0), (data(0)[0], data(0)[0])],
    "another structure": lambda: [*data(0), {"x": data(0)[0]}],
    "no tensor": lambda: [*data(0), 3.0],
    "a file that is not there": lambda: "nowhere.pt",
    "a file of another kind": lambda: "README.md",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calibration(name: str) -> None:
    model = seeded(0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(BadCalibration):
        quantize(model, BAD[name](), "awq-w4g32")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_sizes_that_must_be_equal_are_checked() -> None:
    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(K, K)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.a(x + y)

    b = torch.export.Dim("b")
    x = data(0, 9, K)[0]
    with pytest.raises(BadCalibration, match="9"):
        quantize(seeded(0, Add), [(x, x), (x, x[:1].expand(7, K))], dynamic_shapes={"x": {0: b}, "y": {0: b}})


def test_few_rows_are_noted() -> None:
    q = quantize(seeded(0), data(0, 3, K, batches=1), "awq-w4g32")
    assert all("fewer than 8 rows" in layer.note and layer.route == "" for layer in q.layers)


def test_channels_that_are_always_zero() -> None:
    model, calib = seeded(0, Attention), [F.pad(x[..., :40], (0, 24)) for x in data(0)]
    for scheme in ("awq-w4g32", "awq+gptq-w3g32", "gptq-w2g64-sym", "w8a8"):
        q = quantize(model, calib, scheme)
        assert all(layer.loss <= layer.nearest_loss for layer in q.layers)
        assert plain(q, calib[0]).isfinite().all() and plain(q, data(1)[0]).isfinite().all()


def test_weights_of_zeros_and_of_very_different_sizes() -> None:
    model, calib = seeded(0), data(0)
    with torch.no_grad():
        model.a.weight[:8] = 0
        model.a.weight[8:16] *= 1e-9
        model.b.weight[:, :32] *= 1e9
    for scheme in ("rtn-w4g32", "awq-w4g32", "awq+gptq-w4g32", "w8a8"):
        q = quantize(model, calib, scheme)
        assert relative(plain(q, calib[0]), model(calib[0])) < 0.05, scheme


def test_scales_that_leave_the_range_of_halves_on_a_route_are_held_wider() -> None:
    """A channel that is large by its bias alone: its row, with small weights, is divided by a large factor."""
    torch.manual_seed(0)
    model, calib = nn.Sequential(nn.Linear(K, K), nn.Linear(K, 32)).eval(), data(0)
    with torch.no_grad():
        model[0].bias[0] = 1e6
    q = quantize(model, calib, "awq-w4g32")
    first, second = q.layers
    assert second.route == "constants" and first.type.scale == "f32"
    assert relative(plain(q, calib[0]), model(calib[0])) < 1e-2


# -- files of calibration -------------------------------------------------------------------------------------------------


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(K, K)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.a(left) - right


def test_files_of_calibration(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.torch import save_file

    model = seeded(0, Sum)
    left, right = data(0, 12, K, batches=2)
    expected = quantize(model, [(left[i : i + 1], right[i : i + 1]) for i in range(12)], "awq-w4g32")
    torch.save([(left[i : i + 1], right[i : i + 1]) for i in range(12)], tmp_path / "c.pt")
    save_file({"right": right, "left": left}, tmp_path / "c.safetensors")
    np.savez(tmp_path / "c.npz", right=right.numpy(), left=left.numpy())
    for file in ("c.pt", "c.safetensors", "c.npz"):
        q = quantize(model, str(tmp_path / file), "awq-w4g32")
        assert [layer.loss for layer in q.layers] == [layer.loss for layer in expected.layers], file
    np.save(tmp_path / "c.npy", data(0)[0].numpy())
    assert quantize(seeded(0), tmp_path / "c.npy").layers[0].rows_seen == 32


def test_damaged_files_of_calibration(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name in ("c.pt", "c.safetensors", "c.npz", "c.npy"):
        (tmp_path / name).write_bytes(b"nothing of use")
        with pytest.raises(BadCalibration, match="cannot be read"):
            quantize(seeded(0), tmp_path / name)
    save_file({"x": torch.zeros(2, K), "other": torch.zeros(2, K)}, tmp_path / "c.safetensors")
    with pytest.raises(BadCalibration, match="other"):
        quantize(seeded(0), tmp_path / "c.safetensors")
    save_file({"left": torch.zeros(2, K), "right": torch.zeros(3, K)}, tmp_path / "c.safetensors")
    with pytest.raises(BadCalibration, match="one number"):
        quantize(seeded(0, Sum), tmp_path / "c.safetensors")
