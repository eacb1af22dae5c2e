"""One HTML page about a quantized model: error and size of each layer, what stays float and why, what was chosen from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import torch

from ... import __version__
from ..terminal import size

if TYPE_CHECKING:
    from .result import QuantizedModel

TEMPLATE = Path(__file__).with_name("page.html")


def render(model: QuantizedModel, name: str) -> str:
    """The page as text. It refers to nothing outside itself."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=size, root=math.sqrt, percent=percent)
    return environment.from_string(TEMPLATE.read_text()).render(
        name=name,
        versions=f"plait {__version__}, torch {torch.__version__}",
        model=model,
        batches=len(model.batches),
        largest=max((math.sqrt(max(one.nearest_loss, one.loss)) for one in model.layers), default=0.0) or 1.0,
        before=sum(t.nbytes for t in model.captured.constants.values()),
        after=sum(t.nbytes for t in model.graph.constants.values()),
        table=None if model.plan is None else model.plan.table,
    )


def percent(share: float) -> str:
    """A share with three digits: 4.21 %, 0.0123 %."""
    return f"{100 * share:.3g} %"
