"""Quantized linear layers, and checkpoints of AutoAWQ and compressed-tensors, read and written.

Layouts are tested by numbers worked out by hand, and where these packages are installed by the packages themselves.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import io
import json
import pickle
import resource
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plait
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plait.compiler.quantize import awq_format, compressed_format
from plait.compiler.quantize.checkpoints import Checkpoint, QuantizedWeight
from plait.compiler.quantize.loading import load_quantized, read_checkpoint
from plait.compiler.quantize.modules import QuantizedLinear, replace_linears
from plait.errors import (
    BadQuantizedType,
    CannotReplace,
    CannotWriteCheckpoint,
    CheckpointMismatch,
    DamagedCheckpoint,
    PlaitError,
    UnsupportedCheckpoint,
)
from plait.formats import Quantized, QuantizedType, quantize
from plait.formats.quantized import best_layout
from safetensors.torch import load_file, save_file
from torch import nn

AWQ = QuantizedType((48, 64), 4, 32)
BYTES = QuantizedType((32, 48), 8, 48, True, layout="bytes")


class Net(nn.Module):
    """Two linear layers, one of them under two names, and things that stay float."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 48)
        self.norm = nn.LayerNorm(48)
        self.second = nn.Linear(48, 32, bias=False)
        self.again = self.second
        self.register_buffer("unsaved", torch.ones(3), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.norm(self.first(x)))) + self.again(self.norm(self.first(-x)))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def quantized_net(activations: str = "int8") -> Net:
    model = net()
    second = BYTES if activations == "int8" else QuantizedType((32, 48), 4, 16, True, "f32", "rows")
    replace_linears(
        model,
        {
            "first": QuantizedLinear.from_linear(model.first, AWQ),
            "second": QuantizedLinear.from_linear(model.second, second, activations),  # type: ignore[arg-type]
        },
    )
    return model


def rows(count: int = 5, columns: int = 64) -> torch.Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(1))


def random_weight(kind: QuantizedType, seed: int = 0) -> Quantized:
    """Parts with every code, and scales and zeros of all kinds."""
    g = torch.Generator().manual_seed(seed)
    groups = (kind.rows, kind.groups)
    codes = torch.randint(0, kind.levels + 1, kind.shape, generator=g)
    zeros = torch.randint(0, kind.levels + 1, groups, generator=g)
    return kind.pack(codes, torch.rand(groups, generator=g) + 0.01, None if kind.symmetric else zeros)


def same(a: Quantized, b: Quantized) -> bool:
    return a.type == b.type and all(
        x is y is None or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in zip(a[1:], b[1:], strict=True)
    )


def same_checkpoint(a: Checkpoint, b: Checkpoint) -> bool:
    return (
        a.quantized.keys() == b.quantized.keys()
        and all(same(w.parts, b.quantized[n].parts) for n, w in a.quantized.items())
        and all(w.activations == b.quantized[n].activations for n, w in a.quantized.items())
        and all(
            w.bias is v.bias is None or torch.equal(w.bias, v.bias)  # type: ignore[arg-type]
            for w, v in ((w, b.quantized[n]) for n, w in a.quantized.items())
        )
        and a.plain.keys() == b.plain.keys()
        and all(t.dtype == b.plain[n].dtype and torch.equal(t, b.plain[n]) for n, t in a.plain.items())
    )


# -- modules ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_a_quantized_model_runs_everywhere(activations: str) -> None:
    model, x = quantized_net(activations), rows()
    want = model(x)
    near = {"rtol": 1e-4, "atol": 1e-5}
    for strict in (False, True):
        assert torch.allclose(torch.export.export(model, (x,), strict=strict).module()(x), want, **near)
    batch = torch.export.Dim("batch")
    compiled = plait.compile(model, (x,), dynamic_shapes=({0: batch},))
    assert torch.allclose(compiled(x), want, **near)
    assert torch.allclose(compiled(rows(9)), model(rows(9)), **near)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, backend="plait", fullgraph=True)(x), want, **near)


def test_other_parameters_train_through_it() -> None:
    grads = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend="plait", fullgraph=True)):
        torch._dynamo.reset()
        model, x = quantized_net("float"), rows().requires_grad_()
        wrap(model)(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    reference, x = quantized_net("float"), rows().requires_grad_()
    reference.second = reference.again = reference.second.dequantize()  # type: ignore[operator]
    reference.first = reference.first.dequantize()  # type: ignore[operator]
    reference(x).square().sum().backward()
    norms, bias = reference.norm, reference.first.bias
    assert {n for n, _ in quantized_net("float").named_parameters()} == {"first.bias", "norm.weight", "norm.bias"}
    for found in grads:
        for got, want in zip(found, (x.grad, bias.grad, norms.weight.grad, norms.bias.grad), strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_copies_and_states_hold_the_weight(activations: str) -> None:
    model, x = quantized_net(activations), rows()
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = quantized_net(activations)
    for buffer in other.buffers():
        buffer.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), want)


def test_a_state_of_another_type_is_refused() -> None:
    kind = QuantizedType((32, 48), 8, 48, True, layout="rows")
    model = quantized_net()
    state = {**model.state_dict(), "second.codes": quantize(torch.zeros(32, 48), kind).codes}
    with pytest.raises(RuntimeError, match=r"second.codes of i8g48:bytes\[32,48\] is torch.int8.*torch.uint8"):
        model.load_state_dict(state)


def test_casts_leave_codes_and_scales() -> None:
    model = quantized_net("float")
    scales = model.second.scales.clone()
    for dtype in (torch.bfloat16, torch.float16):
        assert model.to(dtype)(rows().to(dtype)).dtype == dtype
        assert model.first.scales.dtype == torch.float16 and model.first.bias.dtype == dtype  # type: ignore[union-attr]
    assert torch.equal(model.second.scales, scales)
    moved = model.to("meta")
    assert all(b.is_meta for b in moved.first.buffers()) and moved.second.scales.dtype == torch.float32


def test_the_float_layer_that_it_stands_for() -> None:
    linear, scale = nn.Linear(64, 48), torch.rand(64) + 0.5
    made = QuantizedLinear.from_parts(quantize(linear.weight, AWQ), linear.bias, input_scale=scale)
    for dtype in (torch.float32, torch.float64):
        stands = made.dequantize(dtype)
        assert torch.allclose(made(rows().to(dtype)), stands(rows().to(dtype)), rtol=1e-4, atol=1e-5)
    assert made.bias is linear.bias and stands.bias is not linear.bias
    assert (made.in_features, made.out_features) == (64, 48)
    assert repr(made) == "QuantizedLinear(u4g32[48,64], bias=True, input_scale=True)"
    assert "i8g48:bytes[32,48], bias=False, activations=int8" in repr(quantized_net().second)


@pytest.mark.parametrize(
    ("match", "arguments"),
    [
        ("activations of int8 take", {"activations": "int8"}),
        ("not 'int4'", {"activations": "int4"}),
        (r"the bias is \[47\]", {"bias": torch.zeros(47)}),
        (r"the input scale is \[48\]", {"input_scale": torch.zeros(48)}),
    ],
)
def test_parts_that_make_no_layer_are_refused(match: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(BadQuantizedType, match=match):
        QuantizedLinear(random_weight(AWQ), **arguments)


def test_weights_that_are_not_finite_are_refused() -> None:
    linear = nn.Linear(64, 48)
    with torch.no_grad():
        linear.weight[3, 4] = float("nan")
    with pytest.raises(BadQuantizedType, match="NaN or infinite"):
        QuantizedLinear.from_linear(linear, AWQ)


def test_all_names_of_a_module_are_replaced() -> None:
    model = quantized_net()
    assert isinstance(model.second, QuantizedLinear) and model.again is model.second


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("third", "has no such module"),
        ("norm", "it is a LayerNorm"),
        ("", "whole model"),
        ("second", r"it is \[32, 48\], and the weight is \[48, 64\]"),
        ("attention.out_proj", "its parent reads the weight itself"),
        ("scaled", "Scaled computes something else"),
    ],
)
def test_what_is_no_linear_is_not_replaced(name: str, match: str) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = net()
    model.attention, model.scaled = nn.MultiheadAttention(64, 2), Scaled(64, 48)
    layer = QuantizedLinear(random_weight(AWQ))
    with pytest.raises(CannotReplace, match=match):
        replace_linears(model, {"first": layer, name: layer})
    assert isinstance(model.first, nn.Linear)


def test_one_module_does_not_become_two() -> None:
    model = net()
    with pytest.raises(CannotReplace, match="another layer"):
        replace_linears(model, {n: QuantizedLinear.from_linear(model.second, BYTES) for n in ("second", "again")})


# -- layouts, by hand ---------------------------------------------------------------------------------------------------


def test_awq_words_by_hand(tmp_path: Path) -> None:
    """Codes 0 to 7 of eight rows: bits 4 i hold row (0, 2, 4, 6, 1, 3, 5, 7)[i]. Row n has scale 2^-n and zero point 8 + n
    (15 for row 7), so that column 0 is (n - 8 - n) / 2^n, and column 1, with the codes 15 - n, is (7 - 2 n) / 2^n."""
    tensors = {
        "a.qweight": torch.tensor([[0x75316420], [0x8ACE9BDF - (1 << 32)]], dtype=torch.int32),
        "a.qzeros": torch.tensor([[0xFDB9ECA8 - (1 << 32)]], dtype=torch.int32),
        "a.scales": (0.5 ** torch.arange(8.0))[None].half(),
    }
    store(tmp_path, tensors, AWQ_CONFIG | {"group_size": 2})
    parts = awq_format.read(tmp_path).quantized["a"].parts
    assert str(parts.type) == "u4g2:rows[8,2]"
    n = torch.arange(8.0)
    assert torch.equal(parts.dequantize(), torch.stack([-8 / 2**n, (7 - 2 * n) / 2**n], 1))
    awq_format.write(tmp_path / "out", awq_format.read(tmp_path))
    assert_same_tensors(tmp_path / "out", tensors)


def test_compressed_words_by_hand(tmp_path: Path) -> None:
    """Nine columns of 4 bits take two words, two rows of zero points one: codes count from -8, packed from 0. Row 0 has the
    codes -8 to 0, the zero point -8 and the scale 2; row 1 the codes 7 to -1, the zero point 7 and the scale 1 / 4."""
    tensors = {
        "a.weight_packed": torch.tensor([[0x76543210, 8], [0x89ABCDEF - (1 << 32), 7]], dtype=torch.int32),
        "a.weight_scale": torch.tensor([[2.0], [0.25]]),
        "a.weight_zero_point": torch.tensor([[0xF0]], dtype=torch.int32),
        "a.weight_shape": torch.tensor([2, 9]),
    }
    store(tmp_path, tensors, compressed_config(symmetric=False, strategy="channel"))
    got = compressed_format.read(tmp_path).quantized["a"].parts.dequantize()
    assert got.tolist() == [[2.0 * i for i in range(9)], [-0.25 * i for i in range(9)]]
    compressed_format.write(tmp_path / "out", compressed_format.read(tmp_path))
    assert_same_tensors(tmp_path / "out", tensors)


def test_compressed_bytes_by_hand(tmp_path: Path) -> None:
    """8 bits symmetric: four codes a word, -128 packed as 0; and the same weight as plain int8."""
    config = compressed_config(num_bits=8, strategy="group", group_size=2)
    tensors = {
        "a.weight_packed": torch.tensor([[0xFF817F00 - (1 << 32)]], dtype=torch.int32),
        "a.weight_scale": torch.tensor([[1.0, 0.5]], dtype=torch.bfloat16),
        "a.weight_shape": torch.tensor([1, 4]),
    }
    store(tmp_path, tensors, config)
    assert compressed_format.read(tmp_path).quantized["a"].parts.dequantize().tolist() == [[-128, -1, 0.5, 63.5]]
    tensors = {"a.weight": torch.tensor([[-128, -1, 1, 127]], dtype=torch.int8), "a.weight_scale": torch.tensor([[0.5]])}
    store(tmp_path / "int", tensors, compressed_config("int-quantized", num_bits=8, strategy="channel", inputs=TOKENS))
    read = compressed_format.read(tmp_path / "int")
    assert read.quantized["a"].activations == "int8"
    assert read.quantized["a"].parts.dequantize().tolist() == [[-64, -0.5, 0.5, 63.5]]
    compressed_format.write(tmp_path / "out", read)
    assert_same_tensors(tmp_path / "out", tensors)


AWQ_CONFIG = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}


def compressed_config(
    format: str = "pack-quantized", inputs: dict | None = None, group: dict | None = None, **weights: Any
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"} | weights, **(group or {})}
    group["input_activations"] = inputs
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}, "ignore": []}


def store(folder: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))


def assert_same_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# -- round trips --------------------------------------------------------------------------------------------------------

WRITERS = {"awq": awq_format.write, "compressed-tensors": compressed_format.write}


@given(st.data(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=30)
def test_checkpoints_survive_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seed: int) -> None:
    """Random codes, scales and zeros, in shards of all sizes."""
    folder = tmp_path_factory.mktemp("trip")
    method = data.draw(st.sampled_from(list(WRITERS)))
    g = torch.Generator().manual_seed(seed)
    group = data.draw(st.sampled_from([5, 8, 32, 64]))
    layers: dict[str, QuantizedWeight] = {}
    for i in range(data.draw(st.integers(1, 4))):
        n, k = 8 * data.draw(st.integers(1, 6)), group * data.draw(st.integers(1, 3))
        kind = QuantizedType((n, k), 4, group, layout=best_layout(k, group))
        if method != "awq" and data.draw(st.booleans()):
            kind = QuantizedType((n + 3, k), 8, k, True, "f32", "bytes")
        elif method != "awq":
            bits, symmetric = data.draw(st.sampled_from([4, 8])), data.draw(st.booleans())
            scale = data.draw(st.sampled_from(["f16", "bf16", "f32"]))
            kind = QuantizedType((n + 5, k), bits, group, symmetric, scale, best_layout(k, group))
        bias = torch.randn(kind.rows, generator=g) if data.draw(st.booleans()) else None
        parts = random_weight(kind, seed + i)
        layers[f"layers.{i}.proj"] = QuantizedWeight(parts, bias, "int8" if kind.layout == "bytes" else "float")
    plain = {"embed.weight": torch.randn(7, 3, generator=g), "norm": torch.randn(3, generator=g).bfloat16()}
    plain["ids"] = torch.arange(4)
    written = Checkpoint(layers, plain, {"model_type": "x", "hidden_size": 64})
    WRITERS[method](folder / "c", written, data.draw(st.sampled_from([1, 2000, 10**9])))
    read = read_checkpoint(folder / "c")
    assert same_checkpoint(read, written)
    assert read.config["hidden_size"] == 64
    WRITERS[method](folder / "again", read)
    assert same_checkpoint(read_checkpoint(folder / "again"), written)
    first, second = ((folder / name / "config.json").read_text() for name in ("c", "again"))
    assert json.loads(first) == json.loads(second)


def test_awq_writes_symmetric_weights_with_zeros(tmp_path: Path) -> None:
    kind = QuantizedType((16, 64), 4, 32, symmetric=True)
    parts = random_weight(kind)
    awq_format.write(tmp_path / "c", Checkpoint({"a": QuantizedWeight(parts)}, {}))
    read = read_checkpoint(tmp_path / "c").quantized["a"].parts
    assert read.type == QuantizedType((16, 64), 4, 32) and torch.equal(read.dequantize(), parts.dequantize())


def test_awq_without_zeros_is_symmetric(tmp_path: Path) -> None:
    parts = random_weight(QuantizedType((16, 64), 4, 32, symmetric=True))
    awq_format.write(tmp_path, Checkpoint({"a": QuantizedWeight(parts)}, {}))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["a.qzeros"]
    store(tmp_path, tensors, AWQ_CONFIG | {"zero_point": False})
    assert same(read_checkpoint(tmp_path).quantized["a"].parts, parts)


def test_awq_with_one_group_a_row(tmp_path: Path) -> None:
    kinds = {"a": QuantizedType((8, 6), 4, 6, layout="rows"), "b": QuantizedType((8, 10), 4, 10, layout="rows")}
    layers = {name: QuantizedWeight(random_weight(kind)) for name, kind in kinds.items()}
    awq_format.write(tmp_path / "c", Checkpoint(layers, {}))
    read = read_checkpoint(tmp_path / "c")
    assert read.config["quantization_config"]["group_size"] == -1 and same_checkpoint(read, Checkpoint(layers, {}))


def test_configs_say_what_is_quantized(tmp_path: Path) -> None:
    plain = {"head.weight": torch.zeros(4, 4), "norm.weight": torch.zeros(4)}
    layers = {"a": QuantizedWeight(random_weight(AWQ))}
    before = {"quant_method": "awq", "modules_to_not_convert": ["vision"]}
    awq_format.write(tmp_path / "awq", Checkpoint(layers, plain, {"quantization_config": before}))
    got = json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]
    assert got == {**AWQ_CONFIG, "modules_to_not_convert": ["vision", "head"]}
    layers["b"] = QuantizedWeight(random_weight(BYTES), None, "int8")
    compressed_format.write(tmp_path / "ct", Checkpoint(layers, plain))
    got = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]
    assert (got["format"], got["ignore"]) == ("mixed-precision", ["head"])
    assert [(g["targets"], g["format"]) for g in got["config_groups"].values()] == [
        (["a"], "pack-quantized"),
        (["b"], "int-quantized"),
    ]


def test_targets_are_found_by_name_pattern_and_class(tmp_path: Path) -> None:
    layers = {n: random_weight(QuantizedType((8, 64), 4, 32, True, "f32"), i) for i, n in enumerate(("x.a", "x.b", "y"))}
    compressed_format.write(tmp_path, Checkpoint({n: QuantizedWeight(p) for n, p in layers.items()}, {}))
    config = compressed_config(strategy="channel")
    right = compressed_config(strategy="group", group_size=32)["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = right | {"targets": [r"re:x\..*"]}
    config["config_groups"]["group_2"] = right | {"targets": ["y"]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    assert all(same(w.parts, layers[n]) for n, w in read_checkpoint(tmp_path).quantized.items())


# -- writing ------------------------------------------------------------------------------------------------------------


def simple(scale: float = 1.0) -> Checkpoint:
    return Checkpoint({"a": QuantizedWeight(random_weight(AWQ))}, {"norm": torch.full((3,), scale)})


@pytest.mark.parametrize("method", WRITERS)
def test_a_checkpoint_is_replaced_as_a_whole(tmp_path: Path, method: str) -> None:
    folder = tmp_path / "c"
    WRITERS[method](folder, simple(), 100)
    assert (folder / "model.safetensors.index.json").exists()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "more").mkdir()
    (folder / "more" / "config.json").write_text("kept")
    WRITERS[method](folder, simple(2))
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
    assert found == ["config.json", "model.safetensors", "more", "more/config.json", "tokenizer.json"]
    assert same_checkpoint(read_checkpoint(folder), simple(2))
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("method", WRITERS)
@pytest.mark.parametrize("shard_bytes", [10_000, 10**9])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, method: str, shard_bytes: int) -> None:
    folder = tmp_path / "c"
    WRITERS[method](folder, simple())
    large = Checkpoint(simple(2).quantized, {"norm": torch.zeros(100_000)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(CannotWriteCheckpoint, match="make room there") as caught:
            WRITERS[method](folder, large, shard_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(folder) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    assert same_checkpoint(read_checkpoint(folder), simple())


def test_a_folder_that_cannot_take_its_place_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    awq_format.write(tmp_path / "c", simple())
    rename = Path.rename
    moved: list[Path] = []

    def second_fails(self: Path, target: Path) -> Path:
        moved.append(self)
        if len(moved) == 2:
            raise OSError("busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(CannotWriteCheckpoint, match="busy"):
        awq_format.write(tmp_path / "c", simple(2))
    assert [p.name for p in tmp_path.iterdir()] == ["c"] and same_checkpoint(read_checkpoint(tmp_path / "c"), simple())


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for place in ("file", "file/c"):
        with pytest.raises(CannotWriteCheckpoint, match="no AWQ checkpoint was written"):
            awq_format.write(tmp_path / place, simple())
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1


def layer(activations: str = "float", **fields: Any) -> QuantizedWeight:
    kind = QuantizedType(**{"shape": (48, 64), "bits": 4, "group": 32} | fields)
    return QuantizedWeight(random_weight(kind), None, activations)  # type: ignore[arg-type]


def far_zeros() -> QuantizedWeight:
    made = layer(layout="rows")
    assert made.parts.zeros is not None
    made.parts.zeros[3, 1] = 16
    return made


def infinite() -> QuantizedWeight:
    made = layer()
    made.parts.scales[0, 0, 3] = float("inf")
    return made


@pytest.mark.parametrize(
    ("method", "layers", "match"),
    [
        ("awq", {}, "these have none"),
        ("awq", {"a": layer(bits=3)}, "a has 3 bits"),
        ("awq", {"a": layer(shape=(12, 64))}, "no multiple of 8"),
        ("awq", {"a": layer(scale="bf16")}, "scales of bf16"),
        ("awq", {"a": layer(), "b": layer(group=64, shape=(8, 128))}, "these have 32, 64"),
        ("awq", {"a": infinite()}, "the scales of a are not all finite"),
        ("awq", {"a": far_zeros()}, "the zero points of a are not all codes"),
        ("compressed-tensors", {}, "no layer is quantized"),
        ("compressed-tensors", {"a": layer(bits=3)}, r"a is u3g32\[48,64\]"),
        ("compressed-tensors", {"a": layer(scale="e8m0")}, "exponents"),
        ("compressed-tensors", {"a": infinite()}, "the scales of a are not all finite"),
        ("compressed-tensors", {"a": far_zeros()}, "the zero points of a are not all codes"),
    ],
)
def test_what_a_format_does_not_hold_is_not_written(tmp_path: Path, method: str, layers: dict, match: str) -> None:
    with pytest.raises(CannotWriteCheckpoint, match=match):
        WRITERS[method](tmp_path / "c", Checkpoint(layers, {}))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "name"), [("awq", "a.qzeros"), ("compressed-tensors", "a.weight_packed")])
def test_two_tensors_of_one_name_are_not_written(tmp_path: Path, method: str, name: str) -> None:
    with pytest.raises(CannotWriteCheckpoint, match=f"two tensors called {name}"):
        WRITERS[method](tmp_path / "c", Checkpoint(simple().quantized, {name: torch.zeros(1)}))


def test_layers_that_scale_their_input_are_not_written() -> None:
    model = net()
    scaled = QuantizedLinear.from_parts(random_weight(AWQ), torch.zeros(48), input_scale=torch.ones(64))
    replace_linears(model, {"first": scaled})
    with pytest.raises(CannotWriteCheckpoint, match="first multiplies its input"):
        Checkpoint.of(model)


# -- damage -------------------------------------------------------------------------------------------------------------


def awq_folder(folder: Path) -> Path:
    layers = {n: QuantizedWeight(random_weight(AWQ, i), torch.zeros(48)) for i, n in enumerate(("a", "b"))}
    awq_format.write(folder, Checkpoint(layers, {"norm": torch.ones(3)}))
    return folder


def packed_folder(folder: Path) -> Path:
    compressed_format.write(folder, Checkpoint({"a": QuantizedWeight(random_weight(AWQ), torch.zeros(48))}, {}))
    return folder


def int_folder(folder: Path) -> Path:
    compressed_format.write(folder, Checkpoint({"a": QuantizedWeight(random_weight(BYTES), None, "int8")}, {}))
    return folder


def changed(**changes: Callable[[torch.Tensor], torch.Tensor] | None) -> Callable[[Path], None]:
    """Change tensors of a layer `a`, or remove them."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors = {n: t.clone() for n, t in tensors.items()}
        for name, do in changes.items():
            if do is None:
                del tensors["a." + name]
            else:
                tensors["a." + name] = do(tensors.get("a." + name, torch.zeros(1))).contiguous()
        save_file(tensors, folder / "model.safetensors")

    return change


def configured(*path: str, value: Any) -> Callable[[Path], None]:
    """Change an entry of quantization_config."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        at = config["quantization_config"]
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return change


def truncated(file: str, keep: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * keep)])

    return change


def nan(t: torch.Tensor) -> torch.Tensor:
    t.view(-1)[5] = float("nan")
    return t


WEIGHTS = ("config_groups", "group_0", "weights")
INPUTS = ("config_groups", "group_0", "input_activations")
DAMAGE = [
    (awq_folder, truncated("model.safetensors", 0.9), r"model.safetensors is damaged: it is no whole safetensors file"),
    (awq_folder, truncated("model.safetensors", 0.01), "it is no whole safetensors file"),
    (awq_folder, truncated("model.safetensors", 0), "it is no whole safetensors file"),
    (awq_folder, lambda f: (f / "model.safetensors").unlink(), "model.safetensors is damaged: it is missing"),
    (awq_folder, truncated("config.json", 0.5), "config.json is damaged: it is no JSON text"),
    (awq_folder, lambda f: (f / "config.json").unlink(), "config.json is damaged: it is missing"),
    (awq_folder, lambda f: (f / "config.json").write_text("[1]"), "it is no JSON object"),
    (awq_folder, changed(qzeros=None), "a.qzeros is missing, which a.qweight needs"),
    (awq_folder, changed(scales=None), "a.scales is missing"),
    (awq_folder, changed(qweight=None), "a.qweight is missing, which a.qzeros needs"),
    (awq_folder, changed(qweight=lambda t: t[:-3]), r"groups of 32 do not divide the 61 columns of a.qweight"),
    (awq_folder, changed(qweight=lambda t: t[:32]), r"a.scales is float16 \[2, 48\], not .* \[1, 48\]"),
    (awq_folder, changed(qweight=lambda t: t[:0]), "a.qweight is empty"),
    (awq_folder, changed(qweight=lambda t: t.long()), "a.qweight is int64"),
    (awq_folder, changed(qweight=lambda t: t[0]), r"a.qweight is int32 \[6\], not int32 \[\?, \?\]"),
    (awq_folder, changed(qzeros=lambda t: t[:, :3]), r"a.qzeros is int32 \[2, 3\], not int32 \[2, 6\]"),
    (awq_folder, changed(qzeros=lambda t: t.float()), "a.qzeros is float32"),
    (awq_folder, changed(scales=lambda t: t.int()), "a.scales is int32"),
    (awq_folder, changed(scales=nan), "a.scales has 1 elements that are NaN or infinite"),
    (awq_folder, changed(scales=lambda t: t / 0), "a.scales has 96 elements"),
    (awq_folder, changed(bias=lambda t: t[:5]), r"a.bias is float32 \[5\]"),
    (awq_folder, configured("bits", value=3), "it has 3 bits"),
    (awq_folder, configured("group_size", value=48), "groups of 48 do not divide the 64 columns of a.qweight"),
    (awq_folder, configured("group_size", value=64), r"a.scales is float16 \[2, 48\], not .* \[1, 48\]"),
    (awq_folder, configured("group_size", value=0), "its group_size is 0"),
    (awq_folder, configured("group_size", value="128"), "its group_size is '128'"),
    (awq_folder, configured("zero_point", value=None), "its zero_point is None"),
    (awq_folder, configured("version", value="gemv_fast"), "its version is 'gemv_fast'"),
    (awq_folder, configured("quant_method", value="gptq"), "its quant_method is 'gptq'"),
    (awq_folder, lambda f: (f / "config.json").write_text("{}"), "it has no quantization_config"),
    (awq_folder, lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "it is a pickle"),
    (packed_folder, changed(weight_packed=None), "a.weight_packed is missing, which a.weight_scale needs"),
    (packed_folder, changed(weight_scale=None), "a.weight_scale is missing"),
    (packed_folder, changed(weight_shape=None), "a.weight_shape is missing"),
    (packed_folder, changed(weight_zero_point=None), "a.weight_zero_point is missing"),
    (packed_folder, changed(weight_shape=lambda t: t + 8), r"a.weight_packed is \[48, 8\], and a.weight_shape says"),
    (packed_folder, changed(weight_shape=lambda t: -t), r"says \[-48, -64\]"),
    (packed_folder, changed(weight_packed=lambda t: t.short()), "a.weight_packed is int16"),
    (
        packed_folder,
        changed(weight_zero_point=lambda t: t[1:]),
        r"a.weight_zero_point is int32 \[5, 2\], not",
    ),
    (packed_folder, changed(weight_scale=nan), "a.weight_scale has 1 elements"),
    (packed_folder, changed(weight_scale=lambda t: t[:, :1]), r"a.weight_scale is float16 \[48, 1\], not .* \[48, 2\]"),
    (packed_folder, changed(weight_g_idx=lambda t: torch.arange(64)), "a.weight_g_idx is no part of the formats"),
    (packed_folder, configured(*WEIGHTS, "symmetric", value=True), "calls the weight symmetric"),
    (packed_folder, configured(*WEIGHTS, "num_bits", value=8), "of 8 bits, which takes"),
    (packed_folder, configured(*WEIGHTS, "num_bits", value=3), "weights of 3 bits"),
    (packed_folder, configured(*WEIGHTS, "type", value="float"), "of type 'float'"),
    (packed_folder, configured(*WEIGHTS, "group_size", value=48), "groups of 48 do not divide the 64 columns"),
    (packed_folder, configured(*WEIGHTS, "group_size", value=None), "with group_size None"),
    (packed_folder, configured(*WEIGHTS, "strategy", value="block"), "the strategy 'block'"),
    (packed_folder, configured(*WEIGHTS, "actorder", value="group"), "in the order of activations"),
    (packed_folder, configured(*INPUTS, value=TOKENS), "input_activations that are not int8"),
    (packed_folder, configured("config_groups", "group_0", "targets", value=["b"]), "no target of its config_groups fits a"),
    (packed_folder, configured("config_groups", "group_0", "targets", value=["re:("]), "is no regular expression"),
    (packed_folder, configured("config_groups", "group_0", "targets", value=None), "no list of targets"),
    (packed_folder, configured("config_groups", "group_0", "output_activations", value=TOKENS), "output_activations"),
    (packed_folder, configured("config_groups", "group_0", "format", value="marlin-24"), "the format 'marlin-24'"),
    (packed_folder, configured("config_groups", value={}), "has no config_groups"),
    (packed_folder, configured("kv_cache_scheme", value=TOKENS), "its kv_cache_scheme changes"),
    (int_folder, changed(weight_scale=None), "a.weight_scale is missing, which a.weight needs"),
    (int_folder, changed(weight=None), "a.weight is missing, which a.weight_scale needs"),
    (int_folder, changed(weight=lambda t: t.float()), "a.weight is float32"),
    (int_folder, changed(weight=lambda t: t[:0]), "a.weight is empty"),
    (int_folder, changed(weight_scale=lambda t: t[:-1]), r"a.weight_scale is float16 \[31, 1\]"),
    (int_folder, configured(*INPUTS, "dynamic", value=False), "input_activations that are not int8"),
    (int_folder, configured(*WEIGHTS, "symmetric", value=False), "zero points in int-quantized"),
    (int_folder, configured(*WEIGHTS, "strategy", value="tensor"), "the strategy 'tensor'"),
]


@pytest.mark.parametrize(("make", "damage", "match"), DAMAGE, ids=[match[:60] for *_, match in DAMAGE])
def test_damaged_checkpoints_are_refused_by_name(
    tmp_path: Path, make: Callable[[Path], Path], damage: Callable[[Path], Any], match: str
) -> None:
    folder = make(tmp_path / "c")
    damage(folder)
    with pytest.raises((DamagedCheckpoint, UnsupportedCheckpoint), match=match) as caught:
        read_checkpoint(folder)
    text = str(caught.value)
    assert str(folder) in text and "way out: " in text
    model = nn.Module()
    model.a = nn.Linear(64, 48)
    with pytest.raises((DamagedCheckpoint, UnsupportedCheckpoint)):
        load_quantized(model, folder)
    assert type(model.a) is nn.Linear


@given(st.data(), st.sampled_from([awq_folder, packed_folder, int_folder]))
@settings(deadline=None, max_examples=150)
def test_any_damage_is_an_error_of_the_catalogue(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, make: Callable[[Path], Path]
) -> None:
    """Bytes of the config, of the header or of the index changed, cut or added; entries of the config replaced."""
    folder = make(tmp_path_factory.mktemp("fuzz") / "c")
    file = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray(file.read_bytes())
    at, what = data.draw(st.integers(0, min(len(content), 700))), data.draw(st.binary(max_size=4))
    until = at + data.draw(st.sampled_from([0, len(what), 40]))
    config = json.loads((folder / "config.json").read_text())
    if data.draw(st.booleans()):
        file.write_bytes(content[:at] + what + content[until:])
    else:
        place = config["quantization_config"]
        while isinstance(place, dict) and place:
            key = data.draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or data.draw(st.booleans()):
                place[key] = data.draw(st.sampled_from([None, True, 0, -1, 7, 1.5, 64, "x", "", [], ["re:["], {}, [{}]]))
                break
            place = place[key]
        (folder / "config.json").write_text(json.dumps(config))
    try:
        read_checkpoint(folder)
    except PlaitError as error:
        assert str(folder) in str(error)


def test_shards_are_checked_against_their_index(tmp_path: Path) -> None:
    layers = {n: QuantizedWeight(random_weight(AWQ, i)) for i, n in enumerate(("a", "b", "c"))}
    folder = tmp_path / "c"

    def fresh() -> list[Path]:
        awq_format.write(folder, Checkpoint(layers, {}), 2000)
        return sorted(folder.glob("*.safetensors"))

    shards = fresh()
    assert len(shards) == 3 and same_checkpoint(read_checkpoint(folder), Checkpoint(layers, {}))
    shards[1].unlink()
    with pytest.raises(DamagedCheckpoint, match=r"model-00002-of-00003.safetensors is damaged: it is missing"):
        read_checkpoint(folder)
    shards = fresh()
    shards[1].write_bytes(shards[0].read_bytes())
    with pytest.raises(DamagedCheckpoint, match=r"model-00002-of-00003.safetensors is damaged: b.qw.* missing \(and 2"):
        read_checkpoint(folder)
    shards = fresh()
    save_file(load_file(shards[0]) | {"stray": torch.zeros(1)}, shards[0])
    with pytest.raises(DamagedCheckpoint, match="stray is not listed"):
        read_checkpoint(folder)
    for listed in ({"a": "../secret.safetensors"}, {"a": 3}, None):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
        with pytest.raises(DamagedCheckpoint, match="its weight_map does not give"):
            read_checkpoint(folder)


# -- loading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", WRITERS)
@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_a_checkpoint_loads_into_a_float_model(tmp_path: Path, method: str, place: str) -> None:
    model = net()
    kind = QuantizedType((32, 48), 4, 16, layout="rows")
    first = QuantizedType((48, 64), 4, 16, layout="rows")
    made = {"first": first, "second": kind}
    replace_linears(model, {n: QuantizedLinear.from_linear(getattr(model, n), k) for n, k in made.items()})
    WRITERS[method](tmp_path / "c", Checkpoint.of(model, {"model_type": "net"}))
    other = net(seed=1).to(place) if place == "cpu" else net().to(place)
    load_quantized(other, tmp_path / "c")
    if place == "meta":
        assert other.unsaved.is_meta  # no checkpoint holds it
    assert torch.equal(other(rows()), model(rows()))
    assert other.again is other.second and str(other.second.type) == str(kind)


def test_tied_tensors_are_stored_once(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = net()
        model.embed = nn.Embedding(32, 48)
        model.head = nn.Linear(48, 32, bias=False)
        model.head.weight = model.embed.weight
        return model

    model = tied()
    replace_linears(model, {"first": QuantizedLinear.from_linear(model.first, AWQ)})
    awq_format.write(tmp_path / "c", Checkpoint.of(model))
    assert "head.weight" not in load_file(tmp_path / "c" / "model.safetensors")
    other = tied()
    load_quantized(other, tmp_path / "c")
    assert other.head.weight is other.embed.weight and torch.equal(other.embed.weight, model.embed.weight)


def test_buffers_that_are_not_saved_may_be_in_a_checkpoint(tmp_path: Path) -> None:
    model = net()
    replace_linears(model, {"first": QuantizedLinear.from_linear(model.first, AWQ)})
    saved = Checkpoint.of(model)
    awq_format.write(tmp_path / "c", Checkpoint(saved.quantized, {**saved.plain, "unsaved": torch.zeros(3)}))
    other = net(seed=1)
    load_quantized(other, tmp_path / "c")
    assert torch.equal(other(rows()), model(rows())) and torch.equal(other.unsaved, torch.ones(3))


def test_names_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    layers = {"first": QuantizedWeight(random_weight(AWQ)), "norm": QuantizedWeight(random_weight(AWQ))}
    layers["gone"] = QuantizedWeight(random_weight(AWQ))
    whole = torch.zeros(32, 48, dtype=torch.int32)
    plain = {"norm.weight": torch.zeros(47), "second.weight": whole, "stray": torch.zeros(1)}
    awq_format.write(tmp_path / "c", Checkpoint(layers, plain))
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointMismatch) as caught:
        load_quantized(model, tmp_path / "c")
    for part in (
        "unexpected: norm.weight, stray",
        "first: the model has a bias, and the checkpoint has none",
        "norm: it is a LayerNorm",
        "gone: the model has no such module",
        "second.weight is torch.int32 [32, 48] in the checkpoint and torch.float32 [32, 48] in the model",
    ):
        assert part in str(caught.value)
    awq_format.write(tmp_path / "d", simple())
    with pytest.raises(CheckpointMismatch, match=r"missing: first.weight, first.bias, norm.weight, norm.bias, sec"):
        load_quantized(model, tmp_path / "d")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and type(model.first) is nn.Linear


# -- the packages themselves --------------------------------------------------------------------------------------------


@functools.cache
def autoawq() -> Any:
    """The module of AutoAWQ's linear layer. Its packages import what packing does not need, so they are left out."""
    found = importlib.util.find_spec("awq")
    if found is None or not found.submodule_search_locations:
        pytest.skip("autoawq is not installed")
    root = Path(found.submodule_search_locations[0])
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules.setdefault(name, package)
    return pytest.importorskip("awq.modules.linear.gemm", exc_type=ImportError)


@pytest.mark.parametrize("shape", [(64, 128), (32, 64), (96, 32)])
def test_autoawq_packs_and_unpacks_the_same(tmp_path: Path, shape: tuple[int, int]) -> None:
    gemm = autoawq()
    made = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(3)), QuantizedType(shape, 4, 32))
    linear = nn.Linear(shape[1], shape[0])
    linear.weight.data = made.dequantize()
    _, scales, zeros = made.type.unpack(*made[1:])
    theirs = gemm.WQLinear_GEMM.from_linear(linear, 4, 32, scales=scales.t().contiguous(), zeros=zeros.t().contiguous())
    state = {"a." + n: t.contiguous() for n, t in theirs.state_dict().items()}
    store(tmp_path, state, AWQ_CONFIG)
    read = awq_format.read(tmp_path)
    assert same(read.quantized["a"].parts, made)
    awq_format.write(tmp_path / "out", read)
    assert_same_tensors(tmp_path / "out", state)
    found = load_file(tmp_path / "out" / "model.safetensors")
    weight = gemm.dequantize_gemm(found["a.qweight"], found["a.qzeros"], found["a.scales"], 4, 32)
    assert torch.equal(weight.t(), made.dequantize(torch.float16))


KINDS = [
    "u4g32[48,128]",
    "i4g64/bf16[30,64]",
    "u4g44/bf16:rows[13,44]",
    "i4g11/f32:rows[30,44]",
    "u8g16/f32:rows[13,64]",
    "i8g32[64,96]",
    "i8g64/bf16:bytes[20,64]",
]


@pytest.mark.parametrize("texts", [*((t,) for t in KINDS), KINDS], ids=str)
def test_compressed_tensors_reads_what_is_written(tmp_path: Path, texts: tuple[str, ...]) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    quantization = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    types_ = [QuantizedType.of(text) for text in texts]
    layers = {
        f"l{i}": QuantizedWeight(random_weight(kind, i), None, "int8" if kind.layout == "bytes" else "float")
        for i, kind in enumerate(types_)
    }
    compressed_format.write(tmp_path / "c", Checkpoint(layers, {}))
    config = json.loads((tmp_path / "c" / "config.json").read_text())["quantization_config"]
    parsed = quantization.QuantizationConfig.model_validate(config)
    found = load_file(tmp_path / "c" / "model.safetensors")
    for name, weight in layers.items():
        scheme = next(s for s in parsed.config_groups.values() if {name, "Linear"} & set(s.targets))
        compressor = compressors.BaseCompressor.get_value_from_registry(scheme.format)
        state = {n.removeprefix(name + "."): t for n, t in found.items() if n.startswith(name + ".")}
        assert set(state) == set(compressor.compression_param_names(scheme))
        got = compressor.decompress(state, scheme)["weight"]
        assert torch.equal(got, weight.parts.dequantize(got.dtype))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_compressed_tensors_writes_is_read(
    tmp_path: Path, bits: int, symmetric: bool, group: int | None, dtype: torch.dtype
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors", exc_type=ImportError)
    quantization = pytest.importorskip("compressed_tensors.quantization", exc_type=ImportError)
    strategy = "channel" if group is None else "group"
    arguments = quantization.QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=-1 if group is None else group
    )
    g = torch.Generator().manual_seed(bits)
    weight = torch.randn(21, 48, generator=g).to(dtype)
    groups = 1 if group is None else 48 // group
    state = {"weight": weight, "weight_scale": (torch.rand(21, groups, generator=g) + 0.1).to(dtype)}
    if not symmetric:
        low = -(2 ** (bits - 1))
        state["weight_zero_point"] = torch.randint(low, -low, (21, groups), generator=g).to(torch.int8)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments, format="pack-quantized")
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    packed = compressor.compress(state, scheme)
    whole = quantization.QuantizationConfig(config_groups={"group_0": scheme}, format="pack-quantized")
    tensors = {"a." + n: t for n, t in packed.items()}
    store(tmp_path, tensors, whole.model_dump(mode="json"))
    read = compressed_format.read(tmp_path)
    want = compressor.decompress(packed, scheme)["weight"]
    assert torch.equal(read.quantized["a"].parts.dequantize(dtype), want)
    compressed_format.write(tmp_path / "out", read)
    assert_same_tensors(tmp_path / "out", tensors)


@pytest.mark.parametrize(("activations", "near"), [("float", 1e-5), ("int8", 3e-3)])
def test_transformers_loads_what_is_written(tmp_path: Path, activations: str, near: float) -> None:
    """A small Llama with layers of 4 bits, of 8 bits, and float ones, through from_pretrained.

    Steps of inputs of int8 are |x| / 127.5 there and |x| / 127 here. Not with zero points: compressed-tensors 0.20 makes
    room for them unpacked when it loads, and refuses its own files too.
    """
    pytest.importorskip("compressed_tensors", exc_type=ImportError)
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        architectures=["LlamaForCausalLM"],
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    replacements = {}
    for name, linear in model.model.named_modules(prefix="model"):
        if isinstance(linear, nn.Linear):
            bits, group = (8, linear.in_features) if "mlp" in name else (4, 32)
            inputs = activations if "mlp" in name else "float"
            kind = QuantizedType(linear.weight.shape, bits, group, True, "f32", "bytes" if inputs == "int8" else "panels")
            replacements[name] = QuantizedLinear.from_linear(linear, kind, inputs)
    replace_linears(model, replacements)
    compressed_format.write(tmp_path / "c", Checkpoint.of(model, config.to_dict()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "c", dtype=torch.float32).eval()
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        want = model(tokens).logits
        assert torch.allclose(theirs(tokens).logits, want, rtol=0, atol=near)
        ours = transformers.LlamaForCausalLM(config).eval()
        load_quantized(ours, tmp_path / "c")
        assert torch.equal(ours(tokens).logits, want)
