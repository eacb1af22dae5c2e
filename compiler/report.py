"""One HTML page about a compiled model or training step: what runs where and why, passes, the graph, kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import torch

from .. import __version__

if TYPE_CHECKING:
    from .api import CompiledModel
    from .profile import Profile
    from .training import CompiledStep

TEMPLATE = Path(__file__).with_name("report.html")


def render_report(model: CompiledModel | CompiledStep, profile: Profile | None = None) -> str:
    """The page as text, with a profile of the model where one is given. It refers to nothing outside itself."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text()).render(
        name=model.record.name,
        versions=f"plait {__version__}, torch {torch.__version__}",
        coverage=model.coverage,
        profile=profile,
        steps=[(s, model.diff(i).splitlines()) for i, s in enumerate(model.history)],
        said=[str(one) for one in model.record.said],
        graph=model.graph,
        kernels=model.kernels,
    )


def write_report(model: CompiledModel | CompiledStep, path: str | Path, profile: Profile | None = None) -> None:
    """Write the page to `path`."""
    Path(path).write_text(render_report(model, profile), encoding="utf-8")
