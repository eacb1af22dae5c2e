"""Finding the culprit: numbered choices, the first bad node, reduction; what watching costs."""

from __future__ import annotations

from .. import culprits
from ..runner import Letter, Suite

SUITE = Suite(
    "debug",
    "find the culprit: bisection, first bad node, reduction, overhead of history",
    (
        Letter(
            "a",
            "forty planted faults in a 12-layer transformer, a convolutional network and a training step",
            "bisect names 38, the first bad node 36, reduction leaves 5 nodes or fewer in 36; each within 60 s",
            culprits.plants,
            sample="four faults in the two small programs",
            seconds=25.0,
        ),
        Letter(
            "b",
            "cost of history and provenance when nobody looks",
            "at most 10 % of the compile time",
            culprits.overhead,
            sample="three rounds",
            seconds=8.0,
        ),
        Letter(
            "c",
            "from a wrong number to the guilty line, as an example",
            "it runs and names the line",
            culprits.walk,
            sample="the example itself",
            seconds=12.0,
        ),
    ),
)
