"""The command line. Commands are thin: each parses, calls one function elsewhere and prints what it returns."""

from __future__ import annotations

import click

from .. import __version__
from .commands.bench import bench
from .commands.cache import cache
from .commands.debugging import bisect, bundle, reduce, replay
from .commands.look import diff, env, passes
from .commands.models import compile_command, demo, explain, inspect, run
from .commands.plan import plan
from .commands.quantize import quantize
from .commands.shared import Main


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="plait %(version)s")
def main() -> None:
    """plait compiles PyTorch models.

    Results go to stdout, progress and errors to stderr. SRC is `file.pt2` (torch.export), or `package.module:factory`, a
    function without arguments that returns a module or (module, example inputs[, dynamic shapes]). Modules in the current
    folder are found.
    """


for _command in (
    bench, bisect, bundle, cache, compile_command, demo, diff, env, explain, inspect, passes, plan, quantize, reduce, replay,
    run,
):  # fmt: skip
    main.add_command(_command)

if __name__ == "__main__":
    main()
