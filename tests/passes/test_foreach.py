"""Lists of tensors, op by op: every overload against torch's own."""

import random

import pytest
import torch
from plait.passes.foreach import decompositions

SEED = random.SystemRandom().randrange(1 << 30)


@pytest.mark.parametrize("op", decompositions(), ids=str)
def test_members_are_what_torch_computes(op: torch._ops.OpOverload) -> None:
    g = torch.Generator().manual_seed(SEED)

    def some(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=g) * 0.8 + 0.1

    args: list[object] = []
    for a in op._schema.arguments:
        kind = str(a.type)
        if a.kwarg_only:
            continue
        if kind == "List[Tensor]":
            args.append([some(3), some(1), some(2, 0), some(4, 2)])
        elif kind == "Tensor":
            args.append(some(4) if a.name == "scalars" else some())
        else:
            args.append([0.5, 0.25, 2.0, 3.0] if kind.startswith("List") else 0.5)
    expected, got = op(*args), decompositions()[op](*args)
    torch.testing.assert_close(got, expected, msg=f"seed {SEED}")
