"""The spine: capture to generated kernels behind torch.compile. What the first milestone has to show, a letter each."""

from __future__ import annotations

from .. import fresh_clone, generated, graphs, models, op_db, times
from ..runner import Letter, Suite

SUITE = Suite(
    "spine",
    "capture, IR, passes, generated kernels and runtime, end to end",
    (
        Letter(
            "a",
            "`make demo` and `make test`, each in a fresh clone",
            "both exit 0, the tests within 15 minutes",
            fresh_clone.measure,
            optional=True,
        ),
        Letter(
            "b",
            "real models: forward with dynamic batch and length, ten Adam steps, coverage",
            "every answer right, nothing recompiled",
            models.measure,
            sample="gpt2 forward",
            seconds=14.0,
        ),
        Letter(
            "c",
            "the op database, forward, float32, CPU",
            "0 silently wrong",
            op_db.measure,
            sample="ten common ops, as many samples as 12 s allow",
            seconds=15.0,
        ),
        Letter(
            "d",
            "times beside eager and Inductor, compile time, cost of a call",
            "stated; every answer right",
            times.measure,
            sample="two micro-benchmarks",
            seconds=10.0,
        ),
        Letter(
            "e",
            "200 generated programs",
            "none silently wrong, none raises",
            generated.measure,
            sample="every twentieth seed",
            seconds=8.0,
        ),
        Letter(
            "f",
            "import rule; text round trip and running of every graph that the tests make",
            "no failure",
            graphs.rules,
            sample="the import rule, graphs of six generated programs",
            seconds=8.0,
        ),
        Letter(
            "g",
            "5,000 nodes through import, standard pipeline and verifier",
            "1 s beside capture",
            graphs.large,
            sample="static sizes",
            seconds=6.0,
        ),
    ),
)
