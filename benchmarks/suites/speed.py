"""Speed on CPUs, fast compilation, and the op database: what the issue of that name has to show, a letter each."""

from __future__ import annotations

from .. import compile_time, generated, models, op_db, overhead, soak, speeds
from ..runner import Letter, Suite

SUITE = Suite(
    "speed",
    "speed on CPUs beside eager and Inductor, compile time, the op database forward and backward",
    (
        Letter(
            "a",
            "the op database, forward and backward",
            "forward 97 % of ops right, 70 % without a fallback of those that Inductor lowers without one; backward 92 %; "
            "0 silently wrong",
            op_db.breadth,
            sample="ten common ops, as many samples as 12 s allow",
            seconds=15.0,
        ),
        Letter(
            "b",
            "eight models: forward with dynamic sizes, ten training steps",
            "every answer right",
            models.every,
            sample="gpt2 forward",
            seconds=14.0,
        ),
        Letter(
            "c",
            "times beside eager and Inductor; five models beside OpenVINO and ONNX Runtime",
            "geometric means over Inductor: micro-benchmarks 2x, transformers 1.7x (frozen 1.6x), convolutional 1.1x, "
            "bfloat16 1.15x, training steps 1.3x; nothing slower than eager or Inductor; ahead of OpenVINO and ONNX Runtime",
            speeds.measure,
            sample="two micro-benchmarks",
            seconds=10.0,
        ),
        Letter(
            "d",
            "compile time, cold and warm, and the loading of an artifact",
            "own part 1/6 of Inductor's, whole cold and warm start 1/2 (medians); 100 MiB load in 0.5 s",
            compile_time.measure,
            sample="gpt2 by plait alone",
            seconds=14.0,
        ),
        Letter(
            "e",
            "what a call costs above its kernels, and the smallest call beside Inductor's",
            "a CompiledModel at most 10 µs and 1 µs per launch; through torch.compile not above Inductor's",
            overhead.measure,
            sample="a part of the nets, fewer rounds",
            seconds=8.0,
        ),
        Letter(
            "f",
            "20,000 calls from 8 threads over changing sizes; processes that share a cache; full and read-only disks",
            "no wrong result, no growth of memory, clear behaviour",
            soak.measure,
            sample="fewer calls, one pair of processes",
            seconds=8.0,
        ),
        Letter(
            "g",
            "2,000 generated programs",
            "none silently wrong",
            generated.many,
            sample="every two hundredth seed",
            seconds=8.0,
        ),
    ),
)
