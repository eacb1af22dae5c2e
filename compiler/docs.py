"""Pages of `docs/` that are written from the code: errors, passes, command line.

python -m plait.compiler.docs --check     exit code 1 and the page's name where one is out of date
python -m plait.compiler.docs --write     rewrite them (`make docs`)
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING
from pathlib import Path

import click

from .. import config
from ..errors import PlaitError, catalogue
from ..passes import PASSES, Numerics, Pass, registry
from . import options
from .cli import main
from .commands.shared import EXIT_CODES
from .env import VARIABLES

FOLDER = Path(__file__).parent.parent / "docs"
_NOTE = "<!-- Written by `make docs` from {source}. Change it there. -->\n"
_GROUPS = {
    "P01": "The intermediate representation",
    "P02": "Passes",
    "P03": "Code generation",
    "P04": "Compiling",
    "P05": "Running plans and artifacts",
    "P06": "Settings",
    "P07": "The command line",
    "P08": "Programs for one instance, run as batches",
    "P09": "Quantization",
    "P12": "Mixtures of experts",
    "P14": "Pipeline stages",
}


def errors_page() -> str:
    """One entry for each class of the catalogue, in the order of codes."""
    lines = [
        "# Errors",
        _NOTE.format(source="errors.py"),
        "Every error that plait raises on purpose is a `plait.PlaitError` with a stable code. The message says what is",
        "wrong in your words and ends with the way out; where it comes from a line of your model, that line is named.",
    ]
    group = ""
    for cls in catalogue():
        if cls.code[:3] != group:
            group = cls.code[:3]
            lines += ["", f"## {_GROUPS.get(group, group)}"]
        lines += ["", *_error(cls)]
    return "\n".join(lines) + "\n"


def _error(cls: type[PlaitError]) -> Iterator[str]:
    yield f"### {cls.code} {cls.__name__}"
    yield inspect.getdoc(cls) or ""
    yield ""
    message, fix = (text.replace("{{", "{").replace("}}", "}") for text in (cls.message, cls.fix))
    yield f"- Message: `{' '.join(message.split())}`"
    yield f"- Way out: {fix}"


def passes_page() -> str:
    """One entry for each registered pass, by name."""
    lines = [
        "# Passes",
        _NOTE.format(source="the passes' declarations"),
        "One declaration is the option of `torch.compile` and `plait.compile`, the command-line flag and this page.",
        "Numerics: *exact* means bit-equal when the graph before and after is interpreted by the ops' references on the",
        "CPU, *reassociates* means equal up to the order of sums, *approximate* names its bound.",
    ]
    for name in sorted(PASSES):
        lines += ["", *_pass(PASSES[name])]
    return "\n".join(lines) + "\n"


def _pass(cls: type[Pass]) -> Iterator[str]:
    summary, _, rest = (inspect.getdoc(cls) or "").partition("\n")
    yield f"## {cls.name}"
    yield summary
    if rest.strip():
        yield from ("", "```text", rest.strip("\n"), "```")
    yield ""
    yield f"- Works on: {cls.at} graphs; numerics: {_numerics(cls)}"
    for title, facts in (("Requires", cls.requires), ("Establishes", cls.establishes), ("Preserves", cls.preserves)):
        if facts:
            yield f"- {title}: {', '.join(sorted(facts))}"
    infos = registry.describe(cls)
    if infos:
        yield from ("", "| option | kind | default | |", "|---|---|---|---|")
    for info in infos:
        default = "must be given" if info.required else f"`{info.default}`"
        yield f"| `{info.name}` | {info.type} | {default} | {info.doc} |"


def _numerics(cls: type[Pass]) -> str:
    if any(f.default is MISSING and f.default_factory is MISSING for f in dataclasses.fields(cls)):
        return "as its options say"
    promise: Numerics = cls().numerics()
    return f"{promise.kind} (bound {promise.bound:g})" if promise.kind == "approximate" else promise.kind


_BACKGROUND = (
    "With `compile_budget_s` a compilation that does not fit into the budget goes on in a thread, and calls begin",
    "with a plan that runs op by op in torch and needs no compiler. The budget counts plait's own part, from when the",
    "graph is handed over; passes run in any case (0.1 ms for each node). What is ready is judged in the next call:",
    "both plans run on its inputs, copied where the graph writes them, and the better one takes over if the answers",
    'agree. A wrong plan is kept out, written down as a bundle and warned of; with `verify="each-pass"` it is an',
    "error. Graphs that draw random numbers are not run twice: their plans are exchanged where both draw the same in",
    'the same order. While choices are bisected there is no budget; with `fallback="error"` kernels are generated at',
    "once, so that what is refused is refused at once. An artifact that is saved meanwhile holds the kernels,",
    "compiled in full for it.",
    "",
    "`plait.wait(timeout)` waits until nothing is being compiled; `record.plan` and `record.swaps` (of",
    "`plait.observe()`, or of a model of `plait.compile`) and the logs say which plan runs, what became of the better",
    "one and how long it took.",
    "",
    "```python",
    "import torch",
    "import plait",
    "",
    'compiled = plait.compile(torch.nn.Linear(8, 8).eval(), (torch.ones(2, 8),), options={"compile_budget_s": 0})',
    "compiled(torch.ones(2, 8))  # runs at once",
    "plait.wait()",
    "compiled(torch.ones(2, 8))  # judges the kernels: from now on they run",
    "print(compiled.record.swaps)",
    "```",
    "",
    'With `specialise="measured"` sizes that come again and again (16 calls) are tried as a static variant of the',
    "dynamic graph: compiled in the background, judged in the same way, timed against the dynamic plan in twelve",
    "calls of each by turns, and kept if it saves more than 5 % of the time and more than the spread explains. At",
    "most four for a graph are tried; `record.swaps` lists them with their sizes and what they saved. Artifacts hold",
    "the dynamic plan alone.",
)


def options_page() -> str:
    """What can be chosen for one compilation, and what holds for the process."""
    lines = [
        "# Options and settings",
        _NOTE.format(source="compiler/options.py and config.py"),
        'Options hold for one compilation: `torch.compile(model, backend="plait", options={...})`,',
        "`plait.compile(..., options={...})`, and `--option key=value` on the command line. An option of a pass is the key",
        "`pass.option`; [passes](passes.md) lists them.",
        "",
        "| option | default | |",
        "|---|---|---|",
        *(f"| `{name}` | `{default!r}` | {doc} |" for name, default, doc in options.describe()),
        "",
        *_BACKGROUND,
        "",
        "Settings hold for the process. The environment overrides `plait.config.configure(...)` and",
        "`plait.config.patch(...)`; an option of the same name overrides both.",
        "",
        "| setting | environment | default | |",
        "|---|---|---|---|",
        *(f"| `{name}` | `{env}` | `{default!r}` | {doc} |" for name, env, default, doc in config.describe()),
    ]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """One entry for each command, with its options; exit codes; environment variables."""
    lines = [
        "# Command line",
        _NOTE.format(source="compiler/cli.py"),
        *(inspect.getdoc(main.callback) or "").splitlines(),
        "",
        "Every command takes `--json` (print the result as JSON), `-v` (show logs, the traceback of errors) and `--help`.",
        "",
        "## Exit codes",
        "| code | meaning |",
        "|---|---|",
        *(f"| {code} | {words} |" for code, words in EXIT_CODES.items()),
        "",
        "## Environment variables",
        "| variable | what it does |",
        "|---|---|",
        *(f"| `{name}` | {words} |" for name, words in VARIABLES.items()),
    ]
    context = click.Context(main, info_name="plait")
    for name in main.list_commands(context):
        command = main.get_command(context, name)
        if command is not None:
            lines += ["", *_command(command, context, 2)]
    return "\n".join(lines) + "\n"


def _command(command: click.Command, parent: click.Context, level: int) -> Iterator[str]:
    context = click.Context(command, info_name=command.name, parent=parent)
    yield f"{'#' * level} {context.command_path}"
    yield from ("```text", context.command_path + " " + " ".join(command.collect_usage_pieces(context)), "```")
    yield inspect.cleandoc(command.help or "").replace("\b\n", "")
    own = [p for p in command.params if isinstance(p, click.Option) and p.name not in ("as_json", "verbose")]
    if own:
        yield from ("", "| option | |", "|---|---|")
    for option in own:
        record = option.get_help_record(context)
        if record is not None:
            yield f"| `{record[0].replace('|', ' or ')}` | {record[1]} |"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None:
                yield ""
                yield from _command(inner, context, level + 1)


PAGES: dict[str, Callable[[], str]] = {
    "errors.md": errors_page,
    "passes.md": passes_page,
    "options.md": options_page,
    "cli.md": cli_page,
}


def outdated(folder: Path = FOLDER) -> list[str]:
    """Names of the pages whose file differs from what the code says."""
    return [n for n, page in PAGES.items() if not (folder / n).exists() or (folder / n).read_text() != page()]


def write(folder: Path = FOLDER) -> None:
    """Write all pages."""
    for name, page in PAGES.items():
        (folder / name).write_text(page())


def _run() -> int:
    parser = argparse.ArgumentParser(description="pages of docs/ that are written from the code")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true")
    what.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        write()
        return 0
    late = outdated()
    for name in late:
        print(f"docs/{name} is out of date: run `make docs`")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(_run())
