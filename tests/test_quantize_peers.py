"""Oracles of quantization order as their papers say, and agree with torchao where that is installed."""

from __future__ import annotations

import pytest
import torch
from plait.benchmarks import llamacpp_peer, oracles, torchao_peer
from plait.benchmarks.environments import NoPeer, installed


def sample(seed: int, outliers: float = 30.0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Correlated activations [1024, 256] with five large channels, and two weights that read them."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(1024, 256, generator=g) @ (torch.randn(256, 256, generator=g) / 16 + torch.eye(256))
    x[:, torch.randperm(256, generator=g)[:5]] *= outliers
    return x, [torch.randn(n, 256, generator=g) / 16 for n in (96, 40)]


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (3, 64)])
@pytest.mark.parametrize("seed", range(2))
def test_better_methods_lose_less(bits: int, group: int, seed: int) -> None:
    x, weights = sample(seed)
    plain = oracles.rtn(x, weights, bits, group)
    unclipped = oracles.awq(x, weights, bits, group, clip=False)
    clipped = oracles.awq(x, weights, bits, group)
    duo = oracles.awq(x, weights, bits, group, duo=True)
    gptq = oracles.gptq(x, weights, bits, group)
    assert clipped.loss < unclipped.loss < 0.5 * plain.loss
    assert duo.loss < 0.5 * plain.loss
    assert gptq.loss < 0.9 * plain.loss
    for found in (plain, unclipped, clipped, duo, gptq):
        scaled = [(w * found.scales).unflatten(-1, (-1, group)) for w in found.weights]
        assert all(len(torch.unique(g.round(decimals=5))) <= 2**bits for w in scaled for g in w[0]), "too many levels"


def test_awq_without_outliers_is_never_worse_than_rounding() -> None:
    x, weights = sample(3, outliers=1.0)
    plain = oracles.rtn(x, weights, 4, 128).loss
    assert oracles.awq(x, weights, 4, 128, clip=False).loss <= plain


def test_losses_are_of_the_output_that_is_given() -> None:
    x, weights = sample(4)

    def product(x: torch.Tensor, ws: object) -> torch.Tensor:
        first, second = (torch.nn.functional.linear(x, w)[:, :40] for w in ws)  # type: ignore[attr-defined]
        return torch.tanh(first) * second

    found = oracles.awq(x, weights, 3, 64, product, clip=[False, True])
    wanted = (product(x, found.weights) - product(x, weights)).pow(2).mean()
    assert found.loss == pytest.approx(float(wanted))


def test_gptq_leaves_exact_weights_alone() -> None:
    x, weights = sample(5)
    exact = [oracles.fake_quantized(w, 4, 64) for w in weights]
    for w, e in zip(oracles.gptq(x, exact, 4, 64).weights, exact, strict=True):
        torch.testing.assert_close(w, e, atol=1e-6, rtol=0)


@pytest.mark.skipif(not torchao_peer.is_there(), reason="needs torchao, which the benchmark of quantization installs")
@pytest.mark.parametrize(("bits", "group"), [(4, 128), (3, 32)])
def test_torchao_agrees(bits: int, group: int) -> None:
    x, weights = sample(6)
    plain = oracles.rtn(x, weights, bits, group).weights
    for found, own in zip(torchao_peer.rounded(weights, bits, group), plain, strict=True):
        torch.testing.assert_close(found, own, atol=1e-6, rtol=0)
    found, scales = torchao_peer.awq(x, weights[:1], bits, group)
    own = oracles.awq(x, weights[:1], bits, group, clip=False)
    torch.testing.assert_close(scales[0], own.scales)
    torch.testing.assert_close(found[0], own.weights[0], atol=1e-5, rtol=0)


def test_a_peer_that_cannot_be_installed_is_named() -> None:
    with pytest.raises(NoPeer, match="pip cannot install nothing"):
        installed("nothing", ("no such package, surely",))


def test_peers_name_versions() -> None:
    assert all("==" in p for p in (*torchao_peer.PACKAGES, *llamacpp_peer.PACKAGES))
