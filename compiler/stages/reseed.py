"""Random draws that do not depend on who draws when: before each one the generator gets a seed of its own.

The seed comes from the step, the micro-batch and the number of the draw in the model's forward. So a micro-batch draws the
same numbers under every schedule and every partition, on whichever rank, and one step ahead of time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...errors import CannotStage
from ...ir import Builder, Graph, Node, Value
from ...ir.infer import type_of

_library = torch.library.Library("plait", "FRAGMENT")
_library.define("reseed(Tensor seed, int number) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def mixed(*numbers: int) -> int:
    """A 63-bit number that looks random and depends on all of these. Source: Steele et al., SplitMix64, OOPSLA 2014."""
    state = 0
    for n in numbers:
        state = (state + n + _GOLDEN) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def reseed(seed: torch.Tensor, number: int) -> torch.Tensor:
    """Seed the default generators of the CPU, and of CUDA devices where they are in use; gives the seed back."""
    new = mixed(int(seed), number)
    torch.default_generator.manual_seed(new)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(new)
    return seed.clone()


_library.impl("reseed", reseed, "CompositeExplicitAutograd")


@torch.library.register_fake("plait::reseed", lib=_library)
def _fake(seed: torch.Tensor, number: int) -> torch.Tensor:
    return torch.empty_like(seed)


def draws(graph: Graph) -> list[Node]:
    """The nodes that draw random numbers, in order."""
    return [n for n in graph.nodes if n.op.effect == "random" and n.token is not None]


def seeded(graph: Graph, numbers: Sequence[int], name: str) -> Graph:
    """The graph with a seed as one more input, set anew before each draw; `numbers` are those of the draws. The same graph
    where there are none. Raises CannotStage where a draw became several.

    before:  def f(x): y = dropout(x)
    after:   def f(x, seed: i64[]): s = reseed(seed, 3); y = dropout(x)
    """
    found = draws(graph)
    if len(found) != len(numbers):
        why = f"{name} draws {len(numbers)} times, and {len(found)} times once it is differentiated"
        raise CannotStage(why=why, way="replace the op that draws by torch.rand, torch.randn, bernoulli or dropout")
    if not found:
        return graph
    seed = Value(type_of(torch.zeros((), dtype=torch.int64)), "seed")
    builder = Builder(graph)
    at = dict(zip(found, numbers, strict=True))
    for node in graph.nodes:
        if node in at:
            builder.call("plait.reseed.default", seed, at[node], hint="reseeded", loc=node.loc)
        builder.append(node)
    return builder.finish(inputs=(*graph.inputs, seed))


__all__ = ["draws", "mixed", "reseed", "seeded"]
