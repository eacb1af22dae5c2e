"""Letter b: what low-bit weights are worth in time, beside eager, Inductor, torch's own 4-bit kernel and llama.cpp."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import plait
import torch
from torch import Tensor, nn

from .. import llamacpp_peer
from ..environments import NoPeer
from ..harness import Probe, side_by_side
from ..plait_seam import fresh
from ..runner import Outcome, Run
from .products import ATEN, FLOAT, PLAIT, Sizes, beside_aten, beside_float
from .subjects import apart, example, random_llama, rounded_model, smollm2

THREADS = (1, 2)
LAYERS = 7
CAPACITY = 128
POSITION = 64
SHAPES = ((2048, 2048), (512, 2048), (5632, 2048), (2048, 5632))
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
TOKENS = (64, 256)
AGREE = 2e-3
"""Relative difference of logits that compiled and eager float32 may have."""
NOT_BEHIND = 0.97
"""A ratio of medians that is as good as 1: what medians scatter by."""
GOALS = {"eager float32": 3.0, "eager bfloat16": 1.5}
BYTES_GOAL = 1.5
W4, W4W8, W8A8, EAGER = "plait W4", "plait W4, head W8", "plait W8A8", "eager float32"


def measure(run: Run) -> Outcome:
    """Everything, with one thread and with two; a quick run takes one product."""
    probe = Probe()
    if run.quick:
        row = beside_aten(Sizes(1, *SHAPES[0]), torch.get_num_threads(), probe, rounds=10, seconds=2.0)
        ratio = row[f"speedup_over_{ATEN}"][PLAIT.format(dtype="bfloat16")][0]
        return Outcome({f"{Sizes(1, *SHAPES[0])} over torch's kernel": f"{ratio:.2f}x"}, ratio >= NOT_BEHIND, row)
    detail: dict[str, Any] = {"last-level cache": cache_size()}
    parts: dict[str, Callable[[Run, Probe, int], Any]] = {
        "decode": decode, "products": products, "rows": rows, "forward": forward, "SmolLM2": smol,
    }  # fmt: skip
    for name, part in parts.items():
        detail[name] = {}
        for threads in [t for t in THREADS if t <= torch.get_num_threads()]:
            with using(threads):
                detail[name][str(threads)] = part(run, Probe() if threads == 1 else probe, threads)
    return _outcome(detail)


@contextmanager
def using(threads: int) -> Iterator[None]:
    """torch and plait with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        fresh()
        gc.collect()


def cache_size() -> str:
    """Of the last-level cache, as Linux says."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    return path.read_text().strip() if path.exists() else "unknown"


def weights_of(model: nn.Module) -> int:
    """Weights of the layers that are quantized."""
    return sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, nn.Linear))  # type: ignore[union-attr, operator, misc]


def check(name: str, found: Tensor, wanted: Tensor) -> float:
    """How far apart two results are. Raises RuntimeError for other numbers than those that are wanted."""
    difference = apart(found, wanted)
    if difference > AGREE:
        raise RuntimeError(f"{name} gives other numbers: {difference:.1e}")
    return float(f"{difference:.1e}")


def steps(models: Mapping[str, nn.Module], compiled: Mapping[str, nn.Module]) -> tuple[dict[str, Any], dict[str, float]]:
    """(a call of one decode step of each model, how far compiled ones are from eager ones)."""
    of = example("llama").DecodeStep
    token, position = torch.tensor([7]), torch.tensor([POSITION])
    calls: dict[str, Any] = {}
    differences: dict[str, float] = {}
    for name, model in models.items():
        calls[name] = partial(of(model, CAPACITY).eval(), token, position)
    for name, model in compiled.items():
        step = of(model, CAPACITY).eval()
        made = plait.compile(step, (token, position))
        differences[name] = check(name, made(token, position), step(token, position))
        calls[name] = partial(made, token, position)
    return calls, differences


def _row(timings: Any, base: str, more: Mapping[str, Any]) -> dict[str, Any]:
    per_second = {name: round(1e6 / timings.time(name).median, 1) for name in timings.samples}
    return timings.as_json(base) | {"tokens/s": per_second, **more}


def decode(run: Run, probe: Probe, threads: int) -> dict[str, Any]:
    """One token of a model whose weights no cache holds."""
    run.say(f"decode step of random weights, {threads} threads")
    with torch.no_grad():
        model = random_llama(LAYERS)
        narrow = random_llama(LAYERS).bfloat16()
        coded = rounded_model(model, {"model.layers": "w4g128"})
        compiled = {"plait float32": model, W4: coded}
        calls, differences = steps({EAGER: model, "eager bfloat16": narrow}, compiled)
        timings = side_by_side(calls, rounds=25, seconds=90.0, probe=probe)
    sizes = {"weights": weights_of(model), "float32 bytes": 4 * weights_of(model), "apart": differences}
    over = {name: round(timings.speedup(W4, name).median, 3) for name in calls if name != W4}
    return _row(timings, EAGER, sizes) | {"W4 over": over}


def products(run: Run, probe: Probe, threads: int) -> dict[str, Any]:
    """The products of that step one by one, beside torch's kernel."""
    found = {}
    for n, k in SHAPES:
        run.say(f"product by [{n},{k}], {threads} threads")
        found[f"{n}x{k}"] = beside_aten(Sizes(1, n, k), threads, probe, rounds=25, seconds=10.0)
    return found


def rows(run: Run, probe: Probe, threads: int) -> dict[str, Any]:
    """One layer by rows of input, beside plait's float product."""
    found = {}
    for m in ROWS:
        run.say(f"{m} rows by [2048,2048], {threads} threads")
        found[str(m)] = beside_float(Sizes(m, 2048, 2048), threads, probe, rounds=25, seconds=8.0)
    return found


def forward(run: Run, probe: Probe, threads: int) -> dict[str, Any]:
    """Two layers on whole sequences: bytes beside float32."""
    found: dict[str, Any] = {}
    with torch.no_grad():
        model = random_llama(2)
        coded = {W8A8: "w8a8", W4: "w4g128"}
        models = {FLOAT: model, **{n: rounded_model(model, {"model.layers": f}) for n, f in coded.items()}}
        for length in TOKENS:
            run.say(f"{length} tokens, {threads} threads")
            tokens = torch.arange(length)[None] % 512
            made = {name: plait.compile(m, (tokens,)) for name, m in models.items()}
            differences = {n: check(n, made[n](tokens), models[n](tokens)) for n in (FLOAT, W4)}
            other = apart(made[W8A8](tokens), models[W8A8](tokens))  # a sum in another order may round to another byte
            differences[W8A8] = float(f"{other:.1e}")
            calls = {n: partial(m, tokens) for n, m in made.items()}
            timings = side_by_side(calls, rounds=25, seconds=40.0, probe=probe)
            found[str(length)] = timings.as_json(FLOAT) | {"apart": differences}
    return found


def smol(run: Run, probe: Probe, threads: int) -> dict[str, Any]:
    """SmolLM2's decode step beside eager, Inductor and llama.cpp. The head, tied to the embedding, is float32 but in the row
    that says so; llama.cpp has it in 8 bits."""
    run.say(f"SmolLM2, {threads} threads")
    try:
        model, tokenizer = smollm2()
    except example("smollm2").NotInstalled as missing:
        return {"skipped": str(missing)}
    of, token, position = example("llama").DecodeStep, torch.tensor([7]), torch.tensor([POSITION])
    coded = {W4: {"model.layers": "w4g128"}, W4W8: {"model.layers": "w4g128", "lm_head": "w8g64"}}
    with torch.no_grad():
        compiled = {"plait float32": model, **{n: rounded_model(model, formats) for n, formats in coded.items()}}
        calls, differences = steps({EAGER: model}, compiled)
        inductor = torch.compile(of(model, CAPACITY).eval(), dynamic=False)
        check("inductor", inductor(token, position), calls[EAGER]())
        calls["inductor"] = partial(inductor, token, position)
        timings = side_by_side(calls, rounds=25, seconds=60.0, probe=probe)
    row = _row(timings, EAGER, {"apart": differences})
    prompt = torch.tensor(tokenizer.encode("It was the best of times, it was the worst of times,").ids)
    try:
        found = llamacpp_peer.decode(example("smollm2").gguf_path(), prompt, threads)
        row["tokens/s"]["llama.cpp Q4_1"] = round(found.speed, 1)
        row["llama.cpp, runs"] = [round(s, 1) for s in found.speeds]
    except NoPeer as why:
        row["llama.cpp"] = str(why)
    return row


def _outcome(detail: Mapping[str, Any]) -> Outcome:
    decoded, forwards, lines = detail["decode"], detail["forward"], detail["rows"]
    figure: dict[str, Any] = {}
    for peer in (*GOALS, "plait float32"):
        figure[f"decode, W4 over {peer}"] = _by_threads({t: row["W4 over"][peer] for t, row in decoded.items()})
    ratios = {
        t: min(row[f"speedup_over_{ATEN}"][PLAIT.format(dtype="bfloat16")][0] for row in found.values())
        for t, found in detail["products"].items()
    }
    figure["products over torch's 4-bit kernel, the slowest"] = _by_threads(ratios)
    bytes_over = {t: min(row[f"speedup_over_{FLOAT}"][W8A8][0] for row in found.values()) for t, found in forwards.items()}
    figure["W8A8 over plait float32, 64 and 256 tokens, the slower"] = _by_threads(bytes_over)
    slowest = {t: min(row[f"speedup_over_{FLOAT}"]["W4"][0] for row in found.values()) for t, found in lines.items()}
    figure["W4 over the packed float product, 1 to 512 rows, the slowest"] = _by_threads(slowest)
    for threads, row in detail["SmolLM2"].items():
        speeds = row.get("tokens/s", {})
        figure[f"SmolLM2 tokens/s, {threads} threads"] = ", ".join(f"{n} {s:.0f}" for n, s in speeds.items()) or "skipped"
    holds = all(row["W4 over"][peer] >= goal for row in decoded.values() for peer, goal in GOALS.items())
    holds = holds and min(*ratios.values(), *slowest.values()) >= NOT_BEHIND and min(bytes_over.values()) >= BYTES_GOAL
    return Outcome(figure, holds, detail)


def _by_threads(ratios: Mapping[str, float]) -> str:
    return ", ".join(f"{ratio:.2f}x ({threads})" for threads, ratio in ratios.items())
