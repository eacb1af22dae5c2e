"""Whole models on a real GPU: artifacts made from a capture on the CPU, and torch.compile, against eager there."""

from __future__ import annotations

from pathlib import Path

import plait
import pytest
import torch
from plait.codegen.compile import CodegenOptions, compile_graph
from plait.codegen.target import retarget
from plait.compiler.observe import observe
from plait.compiler.source import Targets
from plait.runtime import cuda

from tests import cuda_models
from tests.gpu.kit import target

pytestmark = pytest.mark.gpu

MODELS = [cuda_models.block, cuda_models.mlp]


def capability() -> int:
    return int(target().partition(":")[2])


@pytest.mark.parametrize("make", MODELS)
def test_an_artifact_from_the_cpu_agrees_with_eager(make, tmp_path: Path) -> None:
    model, inputs = make()
    path = tmp_path / "model.plait"
    plait.compile(model, inputs).save(path, targets=Targets(isas=("x86-64-v3",), cuda=(capability(),)))
    loaded = plait.load(path)
    assert loaded.target == target() and loaded.device.type == "cuda"
    model, inputs = model.cuda(), [x.cuda() for x in inputs]
    with torch.no_grad():
        torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=1e-4, atol=1e-5)
        assert torch.equal(loaded(*inputs), loaded(*inputs))
    torch.testing.assert_close(plait.load(path, device="cpu")(*[x.cpu() for x in inputs]), loaded(*inputs).cpu())


def test_dynamic_sizes(tmp_path: Path) -> None:
    model, (tokens,) = cuda_models.mlp()
    made = plait.compile(model, (tokens,), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=512)},))
    made.save(tmp_path / "mlp.plait", targets=Targets(cuda=(capability(),)))
    loaded, model = plait.load(tmp_path / "mlp.plait", device="cuda"), model.cuda()
    for rows in (1, 2, 33, 512):
        given = torch.randint(0, 50, (rows, 7), device="cuda")
        with torch.no_grad():
            torch.testing.assert_close(loaded(given), model(given), rtol=1e-4, atol=1e-6)


def test_a_view_that_starts_off_the_alignment(tmp_path: Path) -> None:
    model, (x,) = cuda_models.block()
    plait.compile(model, (x,)).save(tmp_path / "block.plait", targets=Targets(cuda=(capability(),)))
    loaded, model = plait.load(tmp_path / "block.plait", device="cuda"), model.cuda()
    given = torch.randn(x.numel() + 1, device="cuda")[1:].view(x.shape)
    with torch.no_grad():
        torch.testing.assert_close(loaded(given), model(given), rtol=1e-4, atol=1e-5)


def test_row_ids_out_of_range_raise() -> None:
    model, (tokens,) = cuda_models.mlp()
    graph = retarget(cuda_models.captured(model, (tokens,)))
    run = compile_graph(graph, CodegenOptions(target=target())).executable
    run(tokens.cuda())
    tokens[0, 0] = 50
    with pytest.raises(IndexError, match="row id outside its table"):
        run(tokens.cuda())


def test_half_precision() -> None:
    model, (x,) = cuda_models.block()
    model, x = model.bfloat16(), x.bfloat16()
    compiled = compile_graph(retarget(cuda_models.captured(model, (x,))), CodegenOptions(target=target()))
    with torch.no_grad():
        expected = model.float().cuda()(x.cuda().float())
    (result,) = compiled.executable(x.cuda())
    torch.testing.assert_close(result.float(), expected, rtol=3e-2, atol=3e-2)


def test_torch_compile_trains_with_generated_kernels() -> None:
    model, (x,) = cuda_models.block()
    model, x = model.cuda(), x.cuda()
    expected = model(x)
    expected.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with observe() as seen:
        result = torch.compile(model, backend="plait")(x)
        result.square().sum().backward()
    assert {r.kind for r in seen.graphs} == {"forward", "backward"}
    for record in seen.graphs:
        assert record.compiled is not None and record.compiled.options.target == target() and record.coverage.launches
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_work_on_a_side_stream_is_ordered() -> None:
    model, (x,) = cuda_models.block()
    run = compile_graph(retarget(cuda_models.captured(model, (x,))), CodegenOptions(target=target())).executable
    side, given = torch.cuda.Stream(), x.cuda()
    (expected,) = run(given)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results = [run(given)[0] for _ in range(5)]
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(r, expected) for r in results)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_an_artifact_on_the_second_device(tmp_path: Path) -> None:
    model, (x,) = cuda_models.block()
    plait.compile(model, (x,)).save(tmp_path / "block.plait", targets=Targets(cuda=(capability(),)))
    loaded, model = plait.load(tmp_path / "block.plait", device="cuda:1"), model.to("cuda:1")
    with torch.no_grad():
        torch.testing.assert_close(loaded(x.to("cuda:1")), model(x.to("cuda:1")), rtol=1e-4, atol=1e-5)
    assert torch.cuda.current_device() == 0 and cuda.default_driver().capability(1)
