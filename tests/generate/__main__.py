"""`python -m tests.generate SEED [--backend NAME] [--count N] [--shrink]`: print, check and shrink generated programs."""

from __future__ import annotations

import argparse
import collections
import sys

import torch

from . import Program, check, program, reproduction, shrink


def main() -> int:
    """Without `--backend` print the source of SEED; with it check SEED up to SEED + COUNT - 1. Exit code 1: one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.generate", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--backend", help="compile with this torch.compile backend and compare with eager")
    parser.add_argument("--count", type=int, default=1, help="number of consecutive seeds")
    parser.add_argument("--max-nodes", type=int, default=16)
    parser.add_argument("--shrink", action="store_true", help="reduce a failing program before printing it")
    given = parser.parse_args()
    if not given.backend:
        print(program(given.seed, max_nodes=given.max_nodes).source)
        return 0

    def compile(p: Program):
        torch._dynamo.reset()
        return torch.compile(p.fn, backend=given.backend, fullgraph=True, dynamic=p.dynamic)

    tally: collections.Counter[str] = collections.Counter()
    for seed in range(given.seed, given.seed + given.count):
        made = program(seed, max_nodes=given.max_nodes)
        result = check(made, compile)
        tally[result.kind] += 1
        if result.kind == "close":
            print(f"seed {seed}: close: {result.detail}")
        if not result.fine:
            if given.shrink:
                kind = result.kind
                made = shrink(made, lambda p, kind=kind: check(p, compile).kind == kind)
                result = check(made, compile)
            print(reproduction(made, result, given.backend))
    print(", ".join(f"{n} {kind}" for kind, n in sorted(tally.items())), file=sys.stderr)
    return 0 if set(tally) <= {"equal", "close"} else 1


if __name__ == "__main__":
    sys.exit(main())
