"""Cross-compilation: the binary, what it says about itself, the cache, and what is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from plait.codegen.cache import Cache
from plait.codegen.triton import compile as compiling
from plait.codegen.triton.compile import TARGETS, cross_compile, resources
from plait.codegen.triton.printer import print_kernel
from plait.codegen.triton.source import KernelConfig
from plait.errors import CrossCompilationFailed, NoTriton, UnknownTarget
from plait.runtime.cuda import DeviceBinary

from tests.codegen.kernels import ADD_IN_PLACE, BIAS_GELU, SOFTMAX
from tests.gpu import gpu_check


def test_a_binary_says_what_a_launch_needs(triton_cache: Cache) -> None:
    (source,) = print_kernel(BIAS_GELU.kernel)
    built = cross_compile(source, "cuda:90", triton_cache, aligned=("x", "out"))
    assert built.binary.startswith(b"\x7fELF") and ".target sm_90a" in built.assembly
    assert built.parameters == (("x", "*fp32"), ("bias", "*fp32"), ("out", "*fp32"), ("M", "i64"), ("N", "i64"))
    assert built.aligned == ("x", "out") and built.tiles == source.config.tiles and built.bound_grid == [
        "ceildiv", ["mul", "M", "N"], dict(built.tiles)["XBLOCK"],
    ]  # fmt: skip
    again = DeviceBinary.of(json.loads(json.dumps(built.header())), built.binary, built.assembly)
    assert again == built


@pytest.mark.parametrize("target", ["cuda:80", "cuda:90"])
def test_the_calling_convention_is_the_one_that_launches_assume(target: str, triton_cache: Cache) -> None:
    """The launcher passes the user's arguments and two scratch pointers, eight bytes each."""
    (source,) = print_kernel(SOFTMAX.kernel)
    built = cross_compile(source, target, triton_cache)
    entry = re.search(rf"\.entry {built.name}\((.*?)\)", built.assembly, re.DOTALL)
    assert entry is not None
    parameters = re.findall(r"\.param \.(\w+)", entry.group(1))
    assert parameters == ["u64"] * (len(built.parameters) + 2)
    assert f".reqntid {32 * built.num_warps}" in built.assembly


def test_alignment_buys_wide_accesses(triton_cache: Cache) -> None:
    (source,) = print_kernel(ADD_IN_PLACE.kernel)
    plain = cross_compile(source, "cuda:90", triton_cache)
    wide = cross_compile(source, "cuda:90", triton_cache, aligned=("x", "y", "N"))
    assert "ld.global.v4" in wide.assembly and "ld.global.v4" not in plain.assembly


def test_equal_kernels_compile_once(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = print_kernel(ADD_IN_PLACE.kernel)
    cache = Cache(tmp_path)
    first = cross_compile(source, "cuda:80", cache)
    monkeypatch.setattr(compiling, "_function", lambda source: pytest.fail("compiled again"))
    assert cross_compile(source, "cuda:80", Cache(tmp_path)) == first


def test_binaries_are_the_same_on_every_machine(tmp_path) -> None:
    (source,) = print_kernel(ADD_IN_PLACE.kernel)
    first, second = (cross_compile(source, "cuda:90", Cache(tmp_path / name)) for name in ("here", "there"))
    assert first == second and str(tmp_path).encode() not in first.binary + first.assembly.encode()
    assert f'"/{source.name}.py"' in first.assembly or f'"{source.name}.py"' in first.assembly


def test_resources_of_a_binary(tmp_path, triton_cache: Cache) -> None:
    (source,) = print_kernel(SOFTMAX.kernel)
    found = resources(cross_compile(source, "cuda:90", triton_cache), tmp_path)
    assert found is not None and 8 <= found.registers <= 255 and found.spilled == 0 and found.shared > 0
    assert resources(cross_compile(source, "hip:gfx942", triton_cache), tmp_path) is None


@pytest.mark.parametrize("target", ["cuda", "cuda:sm_90", "hip:90", "vulkan:1", ""])
def test_unknown_targets_are_refused(target: str, triton_cache: Cache) -> None:
    (source,) = print_kernel(ADD_IN_PLACE.kernel)
    with pytest.raises(UnknownTarget, match=re.escape(repr(target))):
        cross_compile(source, target, triton_cache)


def test_a_kernel_that_triton_refuses_is_kept_for_the_report(tmp_path) -> None:
    (source,) = print_kernel(ADD_IN_PLACE.kernel)
    broken = replace(source, text=source.text.replace("c = a + b", "c = a @ b"))
    with pytest.raises(CrossCompilationFailed, match="kernel add_in_place does not compile for cuda:90") as caught:
        cross_compile(broken, "cuda:90", Cache(tmp_path))
    assert caught.value.fields["path"].read_text() == broken.text
    with pytest.raises(CrossCompilationFailed, match="power of 2"):
        cross_compile(source, "cuda:90", Cache(tmp_path), config=KernelConfig((("XBLOCK", 100),)))


def test_compiling_in_an_interpreting_process_is_refused(triton_cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    (source,) = print_kernel(ADD_IN_PLACE.kernel)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(NoTriton, match="TRITON_INTERPRET is set"):
        cross_compile(source, "cuda:90", triton_cache)


def test_targets_name_two_cuda_generations_and_one_of_amd() -> None:
    assert TARGETS == ("cuda:80", "cuda:90", "hip:gfx942")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_the_gpu_check_says_that_it_needs_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_check"])
    assert gpu_check.main() == 2
    assert "needs a CUDA device" in capsys.readouterr().err
