"""Stacks of matrices, such as the experts of a mixture in one tensor, taken apart into layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import plait
import pytest
import torch
from plait.compiler.debugging.interpret import interpret
from plait.compiler.export import capture_model
from plait.errors import CannotReplace
from plait.ir import Graph, verify
from plait.passes.base import Context
from plait.passes.quantize.experts import split_experts, stacks
from plait.passes.quantize.linears import linears
from plait.passes.quantize.weights import Rtn
from torch import Tensor, nn
from torch.nn import functional as F

E, K, M = 4, 32, 64


class Grouped(nn.Module):
    """Rows sorted by expert, products by grouped_mm: gate and up in one, then down. It is captured in bfloat16 alone."""

    def __init__(self, between: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.router = nn.RMSNorm(K), nn.Linear(K, E, bias=False)
        self.gate_up = nn.Parameter((torch.randn(E, 2 * M, K) / K**0.5).bfloat16())
        self.down = nn.Parameter((torch.randn(E, K, M) / M**0.5).bfloat16())
        self.between = between
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        share, best = self.router(y).softmax(-1).topk(1)
        order = best[:, 0].argsort()
        ends = F.one_hot(best[:, 0], E).sum(0).cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(y[order].bfloat16(), self.gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        hidden = F.silu(gate) * up
        if self.between is not None:
            hidden = self.between(hidden)
        out = F.grouped_mm(hidden, self.down.transpose(1, 2), offs=ends).float() * share[order]
        return x + torch.zeros_like(x).index_copy(0, order, out)


class Batched(nn.Module):
    """A matrix of rows for each expert, products by bmm, weights as [E, K, N]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Parameter(torch.randn(E, K, M) / K**0.5), nn.Parameter(torch.randn(E, M, K) / M**0.5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(torch.relu(torch.bmm(x, self.up)), self.down)


def rows(count: int = 24, seed: int = 1) -> Tensor:
    return torch.randn(count, K, generator=torch.Generator().manual_seed(seed))


def taken_apart(model: nn.Module, x: Tensor, dynamic_shapes: Any = None) -> tuple[Graph, Graph]:
    graph = capture_model(model.eval(), (x,), dynamic_shapes).graph
    made = split_experts(graph)
    verify(made)
    return graph, made


def same(graph: Graph, made: Graph, *inputs: Tensor) -> None:
    for found, wanted in zip(interpret(made, inputs), interpret(graph, inputs), strict=True):
        if any(c.dtype == torch.bfloat16 for c in graph.constants.values()):
            torch.testing.assert_close(found, wanted, rtol=0.016, atol=0.016)
        else:
            torch.testing.assert_close(found, wanted)


def test_experts_of_grouped_products_become_layers_with_the_same_results() -> None:
    graph, made = taken_apart(Grouped(), rows())
    assert not stacks(made) and len(stacks(graph)) == 2
    names = {one.name for one in linears(made)}
    assert names == {"router", *(f"{what}.{e}" for what in ("gate_up", "down") for e in range(E))}
    for seed in range(5):
        same(graph, made, rows(seed=seed))
    one_expert = rows()[:1].expand(24, K).contiguous()  # the others have no rows
    same(graph, made, one_expert)


def test_what_lies_between_two_products_is_cut_with_them() -> None:
    _, made = taken_apart(Grouped(), rows())
    assert sum(node.op.name == "aten.silu.default" for node in made.nodes) == E
    assert sum(node.op.name == "aten.index_select.default" for node in made.nodes) == 1  # only the last product is joined


@pytest.mark.parametrize("between", [lambda h: h - h.mean(0), lambda h: h.flip(0), lambda h: h * torch.rand_like(h).ceil()])
def test_what_mixes_rows_is_not_cut(between: Callable[[Tensor], Tensor]) -> None:
    graph, made = taken_apart(Grouped(between), rows())
    assert not stacks(made)
    same(graph, made, rows(seed=3))


def test_any_number_of_rows() -> None:
    graph, made = taken_apart(Grouped(), rows(), ({0: torch.export.Dim("rows", min=2, max=64)},))
    for count in (2, 7, 24, 64):
        same(graph, made, rows(count))


def test_batches_of_matrices() -> None:
    x = torch.randn(E, 5, K, generator=torch.Generator().manual_seed(2))
    graph, made = taken_apart(Batched(), x)
    assert {one.name for one in linears(made)} == {f"{what}.{e}" for what in ("up", "down") for e in range(E)}
    assert sum(node.op.name == "aten.relu.default" for node in made.nodes) == E
    same(graph, made, x)


def test_products_of_two_activations_stay() -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, x.transpose(1, 2))

    graph, made = taken_apart(Scores(), torch.randn(E, 5, K))
    assert made is graph


def test_quantized_experts_run_and_cost_less_by_awq_than_by_rounding() -> None:
    batches = [rows(96, seed) for seed in range(3)]
    model = Grouped().eval()
    quantized = plait.quantize(model, batches, scheme="awq-w4g32", ignore=["router"], want="any")
    assert len(quantized.layers) == 2 * E and not quantized.skipped
    down = [layer for layer in quantized.layers if layer.name.startswith("down")]
    assert all(layer.how.startswith("scaled") and "run time" not in layer.how for layer in down)
    assert all(layer.loss < layer.nearest_loss for layer in quantized.layers)
    for x in (*batches, rows(96, 9)):
        added = model(x) - x  # by the mixture
        assert (quantized(x) - model(x)).norm() < 0.15 * added.norm()
        torch.testing.assert_close(quantized(x), interpret(quantized.graph, (x,))[0], rtol=0.016, atol=0.016)


def test_stacks_that_are_not_asked_for_stay_whole() -> None:
    quantized = plait.quantize(Grouped().eval(), [rows()], scheme="rtn-w8g32", targets=["router"], want="any")
    assert len(stacks(quantized.graph)) == 2
    some = plait.quantize(Grouped().eval(), [rows()], scheme="rtn-w8g32", targets=["re:down"], want="any")
    assert [stack.name for stack in stacks(some.graph)] == ["gate_up"] and len(some.layers) == E


@pytest.mark.parametrize("want", ["faster", "smaller"])
def test_stacks_whose_matrices_all_stay_float_stay_whole(want: str) -> None:
    batches = [rows(96, seed) for seed in range(2)]
    quantized = plait.quantize(Grouped().eval(), batches, scheme="rtn-w8g1", targets=["re:gate_up|down"], want=want)
    assert not quantized.layers and {stack.name for stack in stacks(quantized.graph)} == {"gate_up", "down"}
    assert {one.name for one in quantized.skipped} == {"gate_up", "down"}
    assert all("bytes" in one.why for one in quantized.skipped)


def test_experts_in_a_table_and_within_a_budget() -> None:
    batches = [rows(96, seed) for seed in range(2)]
    table = plait.what_if(Grouped().eval(), batches, formats=["w4g32", "w8g32"], want="any", ignore=["router"])
    assert {f"down.{e}" for e in range(E)} <= set(table.by_layer())
    made = plait.quantize(
        Grouped().eval(), batches, scheme="rtn-w8g32", budget="bytes=40%", formats=["w4g32", "w8g32"], want="any",
        ignore=["router"],
    )  # fmt: skip
    assert len(made.layers) == 2 * E and made.nbytes <= 0.4 * made.float_bytes


def test_the_table_has_experts_that_would_stay_float() -> None:
    table = plait.what_if(Grouped().eval(), [rows(96)], formats=["w8g1"], want="smaller", targets=["re:down"])
    options = table.by_layer()
    assert set(options) == {f"down.{e}" for e in range(E)}
    assert all(any("bytes" in option.why_not for option in found) for found in options.values())


def test_matrices_that_a_call_picks_are_reported() -> None:
    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack, self.last = nn.Parameter(torch.randn(E, K, M)), nn.Linear(M, K)

        def forward(self, x: Tensor, best: Tensor) -> Tensor:
            return self.last(torch.bmm(x[:, None], self.stack[best])[:, 0])

    batches = [(rows(8), torch.arange(8) % E)]
    quantized = plait.quantize(Picked().eval(), batches, scheme="rtn-w8g32", want="any")
    assert [one.name for one in quantized.layers] == ["last"]
    assert [(one.name, one.why) for one in quantized.skipped] == [("stack", "each call picks some of its matrices")]


def test_a_stack_with_two_readers_is_held_once() -> None:
    class Twice(Batched):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    x = torch.randn(E, 5, K, generator=torch.Generator().manual_seed(2))
    graph, made = taken_apart(Twice(), x)
    assert len(made.constants) == 2 * E
    same(graph, made, x)


def test_nothing_is_taken_apart_where_bisection_holds_everything_back() -> None:
    graph = capture_model(Batched().eval(), (torch.randn(E, 5, K),)).graph
    held = Context(at="forward", allow=lambda *_: False)
    assert Rtn(want="any").run(graph, held) is graph


def test_forms_of_a_product_that_are_not_taken_apart_are_reported() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack, self.last = nn.Parameter(torch.randn(E, K, M)), nn.Linear(M, K)

        def forward(self, x: Tensor) -> Tensor:  # the same rows by each matrix
            return self.last(torch.matmul(x[None], self.stack))

    quantized = plait.quantize(Shared().eval(), [rows(8)], scheme="rtn-w8g32", want="any")
    assert [one.name for one in quantized.layers] == ["last"]
    assert [(one.name, one.why) for one in quantized.skipped] == [
        ("stack", "a stack is not taken apart in this form of aten.matmul.default")
    ]


def test_experts_are_no_modules_that_could_be_replaced() -> None:
    quantized = plait.quantize(Grouped().eval(), [rows()], scheme="rtn-w8g32", want="any")
    with pytest.raises(CannotReplace, match=r"down\.0|gate_up\.0"):
        quantized.module()


def test_experts_that_come_in_as_parameters_are_reported() -> None:
    class Both(Batched):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(K, K)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(super().forward(x))

    options = {"passes": ["rtn"], "rtn.bits": 8, "rtn.group": 32, "rtn.want": "any", "freeze": True}
    with plait.observe() as seen, torch.no_grad():
        torch.compile(Both().eval(), backend="plait", options=options)(torch.randn(E, 5, K))
    assert sum("its matrices come in at each call" in why for why in seen.graphs[0].not_applied) == 2


def test_a_mixture_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=K, intermediate_size=M, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=E, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval().requires_grad_(False)
    model.set_experts_implementation("grouped_mm")
    tokens = torch.randint(64, (2, 16))
    quantized = plait.quantize(model, [tokens], scheme="awq-w8g32", ignore=["lm_head", "re:.*gate$"], want="any")
    layer = "model.layers.0.mlp.experts"
    names = {one.name for one in quantized.layers}
    assert {f"{layer}.{what}_proj.{e}" for what in ("gate_up", "down") for e in range(E)} <= names
    torch.testing.assert_close(quantized(tokens).logits, model(tokens).logits, rtol=0.05, atol=0.02)
