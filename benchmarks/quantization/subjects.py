"""What is quantized: SmolLM2, the small Llama of the examples as trained and with outliers, a Llama of random weights that
no cache holds; and how, so that an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import plait
import torch
from plait.compiler.quantize.modules import QuantizedLinear
from plait.compiler.quantize.result import QuantizedModel
from plait.errors import CannotResume
from plait.passes.quantize.scheme import Format
from torch import Tensor, nn

from ..machine import ROOT
from ..runner import Run

EXAMPLES = ROOT / "examples" / "quantize"
KEPT = ROOT / "build" / "quantize"
TINY = KEPT / "tiny.pt"
QUANTIZER = ("passes/quantize", "formats", "compiler/quantize")  # results are kept as long as this code is the same


@cache
def example(name: str) -> Any:
    """A module of the examples' folder; they import each other by name."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


@dataclass(frozen=True)
class Subject:
    """A language model with calibration batches [1, window] and tokens to measure perplexity on, `window` at a time."""

    name: str
    model: nn.Module
    calibration: tuple[Tensor, ...]
    evaluation: Tensor
    window: int

    def perplexity(self, model: nn.Module) -> float:
        """Of another model on the same text."""
        return example("llama").perplexity(model, self.evaluation, self.window)


@cache
def small_llama() -> Any:
    """The small Llama as trained; trained here, once, where no checkpoint is."""
    TINY.parent.mkdir(parents=True, exist_ok=True)
    return example("tiny_llama").train(example("texts").read().training, checkpoint=TINY)


def small(*, outliers: bool, calibration: int = 16, evaluation: int = 64) -> Subject:
    """The small Llama, by windows of 256 bytes."""
    tiny, texts = example("tiny_llama"), example("texts").read()
    model, window = small_llama(), 256
    return Subject(
        "small Llama with outliers" if outliers else "small Llama as trained",
        tiny.inject_outliers(model) if outliers else model,
        spread(tiny.encode(texts.calibration), calibration, window),
        tiny.encode(texts.evaluation)[: evaluation * window],
        window,
    )


@cache
def smollm2() -> tuple[Any, Any]:
    """(SmolLM2-135M in float32, its tokenizer). Raises the example's NotInstalled."""
    model, tokenizer = example("smollm2").load()
    return model.requires_grad_(False), tokenizer


def smol(calibration: int = 8, evaluation: int = 16) -> Subject:
    """SmolLM2 on Hamlet, by windows of 512 tokens, calibrated on windows of 256 of other works."""
    (model, tokenizer), texts = smollm2(), example("texts").read()
    text = texts.calibration[:400_000]
    return Subject(
        "SmolLM2",
        model,
        spread(torch.tensor(tokenizer.encode(text).ids), calibration, 256),
        torch.tensor(tokenizer.encode(texts.evaluation[: evaluation * 4096]).ids)[: evaluation * 512],
        512,
    )


def spread(tokens: Tensor, count: int, window: int) -> tuple[Tensor, ...]:
    """Windows [1, window] at even distances."""
    step = (len(tokens) - window) // count
    return tuple(tokens[i * step : i * step + window][None] for i in range(count))


def random_llama(layers: int, seed: int = 0) -> Any:
    """A Llama of random weights: layers of 45 M weights, a small vocabulary."""
    llama = example("llama")
    config = llama.LlamaConfig(
        vocabulary=512, hidden=2048, layers=layers, heads=32, kv_heads=8, intermediate=5632, context=512, tied=False
    )
    torch.manual_seed(seed)
    return llama.Llama(config).eval().requires_grad_(False)


# -- quantizing -------------------------------------------------------------------------------------------------------------


def quantized(subject: Subject, scheme: str, run: Run, **more: Any) -> QuantizedModel:
    """The subject by a scheme, all layers but the head; finished groups are kept, and an interrupted run goes on."""
    label = f"{subject.name} {scheme}"

    def progress(done: int, of: int, layer: str) -> None:
        run.say(f"{label}: {done} of {of}, {layer}")

    options = {"scheme": scheme, "ignore": ["lm_head"], "want": "any", "progress": progress, **more}
    batches = [(b,) for b in subject.calibration]
    return resumed(label, lambda folder: plait.quantize(subject.model, batches, resume=folder, **options))


def resumed(label: str, call: Callable[[Path], QuantizedModel]) -> QuantizedModel:
    """Call with the folder of a label; anew where what lies there is of another call."""
    folder = code_folder() / label.replace(" ", "-")
    try:
        return call(folder)
    except CannotResume:
        shutil.rmtree(folder, ignore_errors=True)
        return call(folder)


def remembered(label: str, key: str, compute: Callable[[], float]) -> float:
    """A number that an earlier run with the same code has computed, else computed now."""
    path = code_folder() / f"{label.replace(' ', '-')}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if key not in known:
        known = {**known, key: compute()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
    return known[key]


@cache
def code_folder() -> Path:
    """Where results are kept: a folder for each state of the code that quantizes."""
    digest = hashlib.sha256()
    for folder in QUANTIZER:
        for file in sorted((ROOT / folder).glob("*.py")):
            digest.update(file.read_bytes())
    return KEPT / digest.hexdigest()[:12]


def rounded_model(model: nn.Module, formats: dict[str, str]) -> nn.Module:
    """A copy that shares what stays float, with linear layers rounded to nearest, in the format of the first key that a
    layer's name contains."""
    made = shared_copy(model)
    for name, layer in list(made.named_modules()):
        form = next((f for part, f in formats.items() if part in name), None)
        if isinstance(layer, nn.Linear) and form is not None:
            kind = Format.of(form)
            quantized = QuantizedLinear.from_linear(
                layer, kind.type_for(layer.out_features, layer.in_features), "int8" if kind.dynamic else "float"
            )
            put(made, name, quantized)
    return made


def floats(model: nn.Module) -> nn.Module:
    """The model with the float layers that its quantized ones stand for, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            put(model, name, layer.dequantize().requires_grad_(False))
    return model


def shared_copy(module: nn.Module) -> Any:
    """A copy of the modules that shares parameters and buffers."""
    made = module.__new__(type(module))
    made.__dict__.update(module.__dict__)
    for part in ("_parameters", "_buffers"):
        made.__dict__[part] = dict(module.__dict__[part])
    made.__dict__["_modules"] = {n: None if m is None else shared_copy(m) for n, m in module._modules.items()}
    return made


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Set a submodule by its name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


def apart(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest number that is wanted."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
