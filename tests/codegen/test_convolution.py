"""Convolutions on the matmul template, against eager and float64: layouts, borders, sizes, fusion, and who runs what."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import plait
import pytest
import torch
from plait.codegen import tuning
from plait.codegen.templates.convolution_choice import ConvolutionProblem, convolution_candidates
from plait.cost import profile
from plait.cost.profile import Choice, Table, Timing
from torch import nn
from torch.nn import functional as F

pytestmark = pytest.mark.slow  # the compiler builds many drivers

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d}


def problem(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Any, list[torch.Tensor | None], str]:
    """A random convolution with what follows it, its operands, and a description."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    rank = r.choice((1, 2, 2, 2))
    batch, inner, outer = r.choice((1, 2, 5)), r.choice((1, 3, 8, 17, 64)), r.choice((1, 3, 16, 40, 70))
    kernel, stride, dilation, padding = (
        [r.choice(of) for _ in range(rank)] for of in ((1, 1, 2, 3, 5, 7), (1, 1, 2, 3, 9), (1, 1, 2), (0, 1, 2, 4, 9))
    )
    sizes = [r.choice((1, 4, 7, 8, 16, 33)) + (k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    x = torch.randn(batch, inner, *sizes, generator=g, dtype=dtype)
    w = torch.randn(outer, inner, *kernel, generator=g, dtype=dtype)
    bias = torch.randn(outer, generator=g, dtype=dtype) if r.random() < 0.5 else None
    layout = r.choice(("first", "last", "image last", "weight last", "every other")) if rank == 2 else "first"
    if layout in ("last", "image last"):
        x = x.to(memory_format=torch.channels_last)
    if layout in ("last", "weight last"):
        w = w.to(memory_format=torch.channels_last)
    if layout == "every other":
        x = torch.stack((x, -x), -1)[..., 0]
    residual = r.random() < 0.5

    def fn(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = CONVOLUTIONS[rank](x, w, bias, stride, padding, dilation)
        return torch.relu(1.5 * y) + y if residual else y

    text = f"{list(x.shape)} * {list(w.shape)}, {stride=} {padding=} {dilation=} {layout=} {residual=}"
    return fn, [x, w, bias], text


def wide(operands: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if x is None else x.double() for x in operands]


def compiled(fn: Any, dynamic: bool | None = False) -> Any:
    torch._dynamo.reset()
    return torch.compile(fn, backend="plait", dynamic=dynamic, fullgraph=True)


def tuned(fn: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(fn, backend="plait", mode="max-autotune", dynamic=False, fullgraph=True)


def reasons(fn: Any, *operands: Any, **options: Any) -> list[str]:
    torch._dynamo.reset()
    return [
        why
        for name, why in plait.explain(fn, options=options)(*operands).coverage.reasons
        if name.startswith("aten.convolution")
    ]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A function that makes a candidate the fastest in every measurement."""

    def let(winner: str) -> None:
        def measure(candidates: Any, threads: int, budget: float) -> dict[str, Timing]:
            seconds = {name: 1e-6 if name == winner else 2e-6 for name in candidates}
            return {name: Timing(20, s, s, s, s) for name, s in seconds.items()}

        monkeypatch.setattr(profile, "measure_alternating", measure)
        monkeypatch.setattr(tuning, "open_table", lambda path: Table())

    return let


@pytest.mark.parametrize("seed", range(24))
def test_random_convolutions_are_eagers(seed):
    fn, operands, text = problem(seed)
    print(f"seed {seed}: {text}")
    got, expected = compiled(fn)(*operands), fn(*operands)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    real = [d for d, n in enumerate(expected.shape) if n > 1]
    assert [got.stride(d) for d in real] == [expected.stride(d) for d in real]
    assert not reasons(fn, *operands), "float64 convolutions are the template's"


@pytest.mark.parametrize(
    ("image", "weight", "how"),
    [
        ((2, 16, 12, 16), (24, 16, 3, 3), {"padding": 1}),
        ((1, 40, 9, 24), (7 + 6, 40, 5, 3), {"padding": (2, 1), "stride": (2, 1)}),
        ((3, 9, 8, 8), (65, 9, 3, 3), {"padding": 2, "dilation": 2}),
        ((8, 70, 4, 4), (40, 70, 3, 3), {"padding": 1}),  # packed: several images in a panel
        ((2, 24, 18, 18), (30, 24, 3, 3), {}),  # windows read where they lie
        ((2, 40, 9, 7), (24, 40, 1, 1), {"stride": 2}),
        ((130, 32, 1, 1), (20, 32, 3, 3), {"padding": 1}),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_float32_is_as_exact_as_eagers(image, weight, how, last, measured):
    measured("template")
    g = torch.Generator().manual_seed(0)
    x, w, bias = torch.randn(image, generator=g), torch.randn(weight, generator=g), torch.randn(weight[0], generator=g)
    if last:
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))

    def fn(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.gelu(F.conv2d(x, w, bias, **how))

    exact = fn(x.double(), w.double(), bias.double())
    ours, eagers = ((f(x, w, bias) - exact).abs().max() for f in (tuned(fn), fn))
    print(f"error {ours:.2e}, of eager {eagers:.2e}")
    assert ours <= 4 * eagers + 1e-6


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("width", [4, 16])
def test_chunks_of_a_batch_and_threads_change_no_bit(last, width):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(12, 40, width, width, generator=g), torch.randn(48, 40, 3, 3, generator=g)
    x, w = x.double(), w.double()
    if last:
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    f = compiled(lambda x, w: F.conv2d(x, w, None, 1, 1))
    whole = f(x, w)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(f(x, w), whole)
    finally:
        torch.set_num_threads(threads)
    for chunk, of in zip(x.split(3), whole.split(3), strict=True):
        assert torch.equal(compiled(lambda x, w: F.conv2d(x, w, None, 1, 1))(chunk, w), of)


def test_values_that_are_not_finite_stay_in_their_windows():
    x, w = torch.randn(1, 8, 16, 16), torch.randn(8, 8, 3, 3)
    x[0, 3, 0, 0], x[0, 2, 15, 15] = float("nan"), float("inf")

    def fn(x, w):
        return F.conv2d(x, w, None, 1, 1)

    torch.testing.assert_close(compiled(fn)(x, w), fn(x, w), equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(0, 8, 16, 16), (0, 8, 4, 4)])
def test_an_empty_batch(shape):
    def fn(x, w):
        return F.conv2d(x, w, None, 1, 1)

    for dtype in (torch.float32, torch.float64):
        got = compiled(fn)(torch.randn(shape, dtype=dtype), torch.randn(16, 8, 3, 3, dtype=dtype))
        assert got.shape == (0, 16, *shape[2:])


def test_sizes_that_change_from_call_to_call():
    def fn(x, w):
        return torch.relu(F.conv2d(x, w, None, 2, 1))

    f, w = compiled(fn, dynamic=True), torch.randn(12, 6, 3, 3, dtype=torch.float64)
    for batch, height, width in ((2, 9, 11), (3, 16, 16), (5, 7, 20)):
        x = torch.randn(batch, 6, height, width, dtype=torch.float64)
        torch.testing.assert_close(f(x, w), fn(x, w), rtol=1e-11, atol=1e-11)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


def test_what_follows_is_fused_and_an_artifact_runs(tmp_path):
    torch.manual_seed(0)
    model, x = Block().eval().double(), torch.randn(2, 16, 16, 16, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    made = plait.compile(exported)
    assert made.coverage.launches == 2, "one that pads, and the product with all that follows it"
    assert not made.coverage.library and not made.coverage.fallback
    made.save(tmp_path / "block.plait")
    loaded = plait.load(tmp_path / "block.plait")
    for count in (2, 5):
        x = torch.randn(count, 16, 16, 16, dtype=torch.float64)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-11, atol=1e-11)


def test_training_gives_eagers_gradients():
    torch.manual_seed(0)
    model, x = Block().double(), torch.randn(4, 16, 8, 8, dtype=torch.float64)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    compiled(model)(x).square().sum().backward()
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-9, atol=1e-9)


def test_what_stays_with_onednn_says_why():
    def why(fn: Any, *shapes: tuple[int, ...]) -> str:
        (found,) = reasons(fn, *map(torch.randn, shapes))
        return found

    assert "groups" in why(lambda x, w: F.conv2d(x, w, groups=8, padding=1), (1, 8, 16, 16), (8, 1, 3, 3))
    assert "transposed" in why(F.conv_transpose2d, (1, 8, 16, 16), (8, 8, 3, 3))
    assert "three dimensions" in why(F.conv3d, (1, 8, 8, 8, 8), (8, 8, 3, 3, 3))
    assert "max-autotune" in why(F.conv2d, (1, 8, 16, 16), (8, 8, 3, 3))


@pytest.mark.parametrize("last", [False, True])
def test_max_autotune_measures_the_template_against_onednn(last, measured):
    def fn(x, w):
        return F.conv2d(x, w, None, 2, 1)

    def operands(channels: int) -> tuple[torch.Tensor, ...]:
        layout = torch.channels_last if last else torch.contiguous_format
        return tuple(t.to(memory_format=layout) for t in (torch.randn(2, 16, 9, 12), torch.randn(channels, 16, 3, 3)))

    measured("template")
    assert not reasons(fn, *operands(24), mode="max-autotune")
    measured("onednn-convolution")
    x, w = operands(20)
    (why,) = reasons(fn, x, w, mode="max-autotune")
    assert "oneDNN's convolution, measured: 1 µs against 2 µs" in why
    torch.testing.assert_close(tuned(fn)(x, w), fn(x, w), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("how", [((1, 1), (1, 1), (1, 1)), ((2, 1), (0, 2), (1, 2))])
def test_what_is_measured_gives_one_result(last, how, tmp_path):
    x, w = torch.randn(2, 16, 9, 12), torch.randn(24, 16, 3, 3)
    if last:
        x, w = (t.to(memory_format=torch.channels_last) for t in (x, w))
    found: list[ConvolutionProblem] = []

    def choose(problem, *_):
        found.append(problem)
        return Choice("template", Timing(1, 1, 1, 1, 1), False)

    with pytest.MonkeyPatch.context() as patch, plait.config.patch(cache_dir=str(tmp_path / "cache")):
        patch.setattr(tuning, "choose_convolution", choose)
        tuned(lambda x, w: F.conv2d(x, w, None, *how))(x, w)
    both = convolution_candidates(found[0], 2, tmp_path)
    mine, theirs = (both[name]() for name in ("template", "onednn-convolution"))
    rows = theirs.movedim(1, -1) if found[0].pixels == "a" else theirs  # the image may have been laid channels-last
    torch.testing.assert_close(mine.reshape(rows.shape), rows, rtol=1e-4, atol=1e-4)


def test_bytes_of_an_image_are_widened_before_windows_are_taken(measured):
    measured("template")

    def fn(x, w):
        return F.conv2d(x.float(), w, padding=1)

    x, w = torch.randint(0, 256, (2, 16, 9, 8), dtype=torch.uint8), torch.randn(24, 16, 3, 3)
    torch.testing.assert_close(tuned(fn)(x, w), fn(x, w), rtol=1e-4, atol=1e-2)
