"""The optimisations of a batched program, each of which can be left out: what is right stays right."""

from __future__ import annotations

from collections.abc import Collection

from ...errors import UnknownSwitch

SWITCHES = {
    "blocks": "straight-line tensor code runs as one block; without it every op is one",
    "compiled": "blocks are compiled; without it they run in torch",
    "native": "launches whose plans need no Python run in native code, one after the other",
    "shared": "parameters are shared by all instances; without it, those that are arguments of ops are each instance's own",
    "constants": "a constant that every instance makes is made once",
    "depths": "launches follow from the depths of values; without it an agenda picks them from a graph, as in DyNet",
    "agenda": "programs for which an agenda has given fewer launches are scheduled by one",
    "phases": "what follows a call in the program's entry waits until all instances have come so far",
    "ghosts": "what follows a branch is as deep after its shorter side as after its longer one",
    "hoisting": "what does not depend on the recursion runs for all steps of all instances at once",
    "fusion": "products of one operand with several parameters are one product",
    "gathers": "kernels read rows of arguments where they are, where that is measured to be faster than gathering them",
    "fibers": "instances that need a value wait for the others; without it each runs what it needs alone",
    "forks": "calls that have nothing to do with each other wait side by side",
    "structure": "a schedule is kept for when the same structure recurs",
    "opt-out": "what runs faster one by one does so",
}


def checked(without: Collection[str]) -> frozenset[str]:
    """The optimisations to leave out. Raises UnknownSwitch."""
    for name in without:
        if name not in SWITCHES:
            raise UnknownSwitch(name=name, known=", ".join(SWITCHES))
    return frozenset(without)
