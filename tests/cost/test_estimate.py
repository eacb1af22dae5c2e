"""How long nodes take: what was measured, a roofline where nothing was, curves for collectives, shares of rows."""

from __future__ import annotations

import pytest
import torch
from plait.cost.communication import record
from plait.cost.estimate import EXCHANGES, MEASURED, Estimates, Rates, node_key, sent
from plait.cost.profile import Table, Timing
from plait.ir import Builder, Graph, Node, TensorType, Value
from plait.runtime import exchange

assert exchange is not None  # registers the op

RATES = Rates(flops=1e9, bytes=1e9, launch=1e-5)


def timing(seconds: float) -> Timing:
    return Timing(1, seconds, seconds, seconds, seconds)


def nodes() -> tuple[Node, Node, Node, Node]:
    """A product, something elementwise, a view, an exchange of [4, 8, 16] floats."""
    x, w = Value(TensorType((64, 32), torch.float32), "x"), Value(TensorType((32, 16), torch.float32), "w")
    buf, rows = Value(TensorType((4, 8, 16), torch.float32), "buf"), Value(TensorType((4, 2), torch.int64), "rows")
    builder = Builder(Graph("g", (x, w, buf, rows), (), ()))
    builder.call("aten.mm.default", x, w)
    builder.call("aten.relu.default", x)
    builder.call("aten.t.default", x)
    builder.call("plait.all_to_all_capacity.default", buf, rows, None, "world")
    product, relu, view, exchange = builder.nodes
    return product, relu, view, exchange


def test_a_roofline_where_nothing_was_measured() -> None:
    product, relu, view, _ = nodes()
    costs = Estimates(RATES)
    assert costs.compute(product) == pytest.approx(1e-5 + 2 * 64 * 32 * 16 / 1e9)
    assert costs.compute(relu) == pytest.approx(
        64 * 32 / 1e9
    )  # inside the kernel of its reader: no way to memory, no launch
    assert costs.compute(view) == 0


def test_what_was_measured_counts() -> None:
    product, *_ = nodes()
    table = Table()
    table.record(node_key(product, 2, "cpu"), MEASURED, timing(5e-3))
    assert Estimates(RATES, table, threads=2).compute(product) == 5e-3
    assert Estimates(RATES, table, threads=1).compute(product) != 5e-3


def test_other_sizes_miss_their_roofline_as_the_nearest_one_that_was_measured() -> None:
    product, relu, *_ = nodes()
    table = Table()
    plain = Estimates(RATES, table)
    table.record(node_key(product, 1, "cpu"), MEASURED, timing(3 * plain.roofline(product)))
    costs = plain.calibrated([product, relu])
    half = Value(TensorType((32, 32), torch.float32), "x")
    builder = Builder(Graph("g", (half, product.inputs[1]), (), ()))
    builder.call("aten.mm.default", half, product.inputs[1])
    (other,) = builder.nodes
    assert costs.compute(other) == pytest.approx(3 * plain.roofline(other))
    assert costs.compute(relu) == plain.compute(relu)


def test_a_share_of_the_rows_costs_its_share_and_a_launch() -> None:
    product, *_ = nodes()
    costs = Estimates(RATES)
    whole = costs.compute(product)
    assert costs.compute(product, 0.25) == pytest.approx(1e-5 + (whole - 1e-5) / 4)


def test_keys_tell_shapes_and_arguments_apart() -> None:
    product, *_ = nodes()
    other = Value(TensorType((32, 32), torch.float32), "w")
    builder = Builder(Graph("g", (product.inputs[0], other), (), ()))
    builder.call("aten.mm.default", product.inputs[0], other)
    builder.call("aten.transpose.int", other, 0, 1)
    builder.call("aten.transpose.int", other, 1, 0)
    keys = {node_key(n, 1, "cpu") for n in (product, *builder.nodes)}
    assert len(keys) == 4


def test_collectives_by_the_bytes_that_leave() -> None:
    *_, exchange = nodes()
    size = 4 * 8 * 16 * 4
    assert sent(exchange, 4) == size * 3 / 4
    table = Table()
    for count in (0, size):
        record(table, EXCHANGES[0], 4, count, "cpu/gloo", timing(1e-3 + count * 1e-6))
    costs = Estimates(RATES, table, ranks={"world": 4})
    assert costs.collective(exchange) == pytest.approx(1e-3 + size * 0.75e-6)
    assert costs.collective(exchange, 0.5) == pytest.approx(1e-3 + size * 0.375e-6)
    assert Estimates(RATES, table, ranks={"world": 2}).collective(exchange) == 0  # never measured with two
