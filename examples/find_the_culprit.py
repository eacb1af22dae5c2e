"""From a wrong number to the guilty line: which pass, which rewrite, which node, and why a rule did not fire.

python examples/find_the_culprit.py
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import plait
import torch
from plait.ir import Builder, Graph, Match, Rule, Such, Var, pattern
from plait.passes import Context, Numerics, Pass, reassociates
from torch import nn

NUMBER = Such("a", lambda m, a: isinstance(a, float)), Such("b", lambda m, b: isinstance(b, float))


@dataclass(frozen=True)
class ScaleOnce(Pass):
    """Scale once instead of twice. It has a mistake.

    before:  y = x * a * b
    after:   y = x * (a + b)
    """

    name: ClassVar[str] = "scale-once"
    at: ClassVar[Any] = "split"

    def numerics(self) -> Numerics:
        return reassociates()

    def run(self, graph: Graph, ctx: Context) -> Graph:
        def build(m: Match, b: Builder) -> Any:
            return b.call("aten.mul.Tensor", m["x"], m["a"] + m["b"])

        inner = pattern("aten.mul.Tensor", Var("x"), NUMBER[0], sole=True)
        return ctx.rewrite(graph, [Rule("two-scales", pattern("aten.mul.Tensor", inner, NUMBER[1]), build)])


class Mix(nn.Module):
    """Every row becomes a mixture of all rows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [rows, width]."""
        scores = self.query(x) @ self.key(x).transpose(-1, -2)
        weights = torch.softmax(scores * 0.5 * 0.25, -1)
        half = x * 0.5
        return weights @ x + torch.tanh(half * 1.5) * half


def main() -> None:
    """Print each step of the search."""
    torch.manual_seed(0)
    model, x = Mix(8).eval(), torch.randn(6, 8)
    how = {"passes": [ScaleOnce()]}

    print("1. The answer is wrong.")
    compiled = plait.compile(model, (x,), **how)
    with torch.no_grad():
        print(f"   largest difference from eager: {(compiled(x) - model(x)).abs().max():.3f}")

    print("\n2. The ledger shows after which pass.\n")
    dbg = plait.debug(model, (x,), **how)
    dbg.until("prune")
    print(plait.debugging.ledger_table(dbg.ledger()))

    print("\n3. Bisection names the one rewrite, as a diff.\n")
    print(plait.bisect(model, (x,), **how))

    print("\n4. The first node that is wrong although all it reads is right.\n")
    print(plait.first_bad_node(model, (x,), **how))

    print("\n5. It is `a + b` for `a * b` then. And why did the rule not fire at `half * 1.5`?\n")
    print(dbg.why("two-scales", "mul_3")[0])
    print(f"   {dbg.source('mul_3')}")
    kernel = dbg.kernel("mul_3")
    print(f"   computed in {kernel.kind} {kernel.name}")

    print("\n6. An edit by hand shows that this was all.")
    repaired = dbg.edit(str(dbg.graph).replace(", 0.75)", ", 0.125)")).resume()
    with torch.no_grad():
        torch.testing.assert_close(repaired(x), model(x))
    print("   the edited graph computes what eager does")


if __name__ == "__main__":
    main()
