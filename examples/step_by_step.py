"""Walk through a compilation: the graph as captured, what each pass changed, the kernels; run it half-way; edit it by hand.

python examples/step_by_step.py
"""

import plait
import torch
from plait.ir import parse_graph
from torch import nn


class Norm(nn.Module):
    """A scaled root-mean-square norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., width], normalised over its last dimension."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (self.scale * 1.0)


def main() -> None:
    """Print the way from the module to the kernels."""
    model, x = Norm(8).eval(), torch.randn(3, 8)
    compiled = plait.compile(model, (x,))

    print("captured:\n" + str(compiled.captured))
    for step in compiled.history:
        fired = ", ".join(f"{rule} x{count}" for rule, count in step.fired.items()) or "nothing to do"
        print(f"{step.pass_name:10} {len(step.before.nodes):2} -> {len(step.after.nodes):2} nodes  {fired}")
    print("\nwhat fold changed:\n" + compiled.diff("fold"))

    for kernel in compiled.kernels:
        print(f"kernel {kernel.name}, launched {kernel.launches} time(s) in a call, begins:")
        print("".join(f"    {line}\n" for line in kernel.source.splitlines()[:8]))

    # Every graph runs at any moment: here the first step's result, interpreted op by op by torch.
    early = compiled.history[0].after.run(x)[0]
    torch.testing.assert_close(compiled(x), early)

    # A graph is text that parses back, so an experiment is an edit away.
    edited = str(compiled.graph).replace("aten.rsqrt.default", "aten.reciprocal.default")
    experiment = parse_graph(edited, compiled.graph.constants)
    print("rsqrt replaced by reciprocal:", experiment.run(x)[0][0, :3])


if __name__ == "__main__":
    main()
