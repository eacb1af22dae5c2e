"""What all commands share: options, error handling, exit codes."""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ...errors import PlaitError

EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "the command worked and the answer is no: results or files differ, cache entries were damaged, a failure shows again "
    "or there is none to look into",
    2: "wrong use: an option, SRC, a pass or its option; calibration data, a scheme or a budget that does not fit; a "
    "profile of layers that cannot be read, pipeline stages that do not fit model or devices",
    3: "the model could not be compiled or quantized",
    4: "an artifact, a bundle or a checkpoint could not be loaded, or does not take these inputs",
    5: "the model's own code, or plait itself, raised an error that is not in the catalogue",
    6: "the program fails otherwise than its bundle says",
    130: "interrupted",
}
_USAGE = ("P020", "P040", "P06", "P07", "P0903", "P0904", "P0905", "P0906", "P0907", "P0912", "P140")
_ARTIFACT = ("P050", "P051", "P052", "P054", "P0631", "P0632", "P0633", "P0910", "P0911", "P0913")
_NOTHING, _OTHER = "P0611", "P0642"
# Codes of the group P040 that are about the model, not about how the command was called.
_MODEL = ("P0404", "P0405", "P0406", "P0407", "P0408", "P0709")
_USER = ("P0205", "P0206", "P0207", "P0643")

F = TypeVar("F", bound=Callable[..., Any])


def exit_code(error: PlaitError) -> int:
    """The exit code that stands for an error of the catalogue."""
    if error.code in (_NOTHING, _OTHER):
        return 1 if error.code == _NOTHING else 6
    if error.code.startswith(_ARTIFACT) and error.code != "P0524":
        return 4
    return 2 if error.code.startswith(_USAGE) and error.code not in (*_MODEL, *_USER) else 3


class Main(click.Group):
    """Turns errors into exit codes; a traceback is printed with -v, or where the error is not one of the catalogue."""

    def invoke(self, ctx: click.Context) -> Any:
        # torch.export copies its own tree structures in a way that it warns about itself
        warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg")
        try:
            return super().invoke(ctx)
        except PlaitError as error:
            if _verbose(ctx):
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            ctx.exit(exit_code(error))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:  # the model's factory, or a mistake of plait: both are shown in full
            traceback.print_exc()
            click.echo(f"error: {type(error).__name__}: {error}", err=True)
            ctx.exit(5)


def _verbose(ctx: click.Context) -> bool:
    return bool(ctx.find_root().meta.get("plait.verbose"))


def _be_verbose(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().meta["plait.verbose"] = True
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")


def common(command: F) -> F:
    """The options that every command has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)
    return click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_be_verbose, is_eager=True,
        help="Show logs, and the traceback of errors.",
    )(command)  # fmt: skip


def writable(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Callback of an option that names a file to write: refuses what cannot be written before any work is done."""
    if value is not None:
        try:
            with tempfile.TemporaryFile(dir=Path(value).parent):
                pass
        except OSError as error:
            raise click.BadParameter(f"nothing can be written there: {error}") from error
    return value


_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_SIZE = re.compile(r"(?P<number>\d+\.?\d*|\.\d+) ?(?P<unit>[kmgt]?i?)b?", re.IGNORECASE)


def bytes_of(_ctx: click.Context, _param: click.Parameter, value: str | None) -> float | None:
    """Callback of an option that takes a number of bytes: 80GB, 80GiB, 0.5TB, 1000000."""
    found = None if value is None else _SIZE.fullmatch(value.strip())
    unit = found["unit"].lower() if found else ""
    if value is not None and (found is None or unit not in _UNITS or not float(found["number"])):
        raise click.BadParameter(f"write a size such as 80GB, 80GiB or 0.5TB, not {value!r}")
    return float(found["number"]) * _UNITS[unit] if found else None


def inputs_of_source(command: F) -> F:
    """The options that say what to capture SRC on."""
    for option in (
        click.option("--seed", default=0, show_default=True, help="Seed of random inputs."),
        click.option("--dynamic", multiple=True, metavar="NAME:DIM[=[SIZE:]LO..HI]",
                     help="A dimension that may vary; dimensions with the same SIZE are equal."),
        click.option("--shape", "shapes", multiple=True, metavar="NAME=2x3[:DTYPE]",
                     help="Random example input; several with commas or by repeating."),
    ):  # fmt: skip
        command = option(command)
    return command


def choices_of_passes(command: F) -> F:
    """The options that say how to compile."""
    for option in (
        click.option("--option", "settings", multiple=True, metavar="KEY=VALUE", help="An option of compilation, see docs."),
        click.option("--disable-pass", "disabled", multiple=True, metavar="NAMES", help="Passes to leave out."),
        click.option("--pass", "passes", multiple=True, metavar="NAME[:K=V] | NAME.K=V",
                     help="Run a pass besides the standard ones, or set an option of one."),
    ):  # fmt: skip
        command = option(command)
    return command


def options_of(passes: tuple[str, ...], disabled: tuple[str, ...], settings: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """Command-line texts as the `options` of `plait.compile`."""
    found: dict[str, Any] = {k: v for k, v in more.items() if v}
    chosen: list[str] = []
    for text in passes:
        key, eq, value = text.partition("=")
        if eq and "." in key and ":" not in key:
            found[key] = value
        else:
            chosen.append(text)
    for text in settings:
        key, eq, value = text.partition("=")
        found[key] = value if eq else True
    if chosen:
        found["passes"] = chosen
    names = [n.strip() for text in disabled for n in text.split(",") if n.strip()]
    return {**found, "disable_passes": names} if names else found
