"""Results of collectives that are read as they are: a plan reads them after a wait only."""

from __future__ import annotations

from typing import Any

from ..ir import Builder, Graph, Value, flatten
from ..runtime.pending import is_start, is_wait

_WAIT = "_c10d_functional.wait_tensor.default"


def with_waits(graph: Graph) -> Graph:
    """A wait for every collective before anything else reads its result, and at the end where nothing does.

    before:  s = all_reduce(x); y = mul(s, 2)
    after:   s = all_reduce(x); w = wait_tensor(s); y = mul(w, 2)
    """
    started = {n: n.results for n in graph.nodes if is_start(n.op.name)}
    if not started:
        return graph
    pending = {v for results in started.values() for v in results}
    waited = {n.args[0] for n in graph.nodes if is_wait(n.op.name)}
    builder = Builder(graph)

    def wait(values: Any) -> None:
        for v in values:
            if v in pending and v not in builder.subst:
                builder.subst[v] = builder.call(_WAIT, v, hint=v.hint)
                waited.add(v)

    for node in graph.nodes:
        if is_wait(node.op.name) and node.args[0] in pending:
            builder.append(node)
        else:
            wait(node.inputs)
            builder.append(builder.resolved(node))
    wait(v for v in [*flatten(graph.outputs), *(v for _, v in graph.writes)] if isinstance(v, Value))
    wait(results[0] for results in started.values() if results and waited.isdisjoint(results))
    return builder.finish() if len(builder.nodes) > len(graph.nodes) else graph
