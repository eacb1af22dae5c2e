"""Command line: `python -m benchmarks --list`, `python -m benchmarks [NAME …] [--quick] [--json FILE] [--store]`.

Results go to stdout, progress to stderr when it is a terminal. Exit code 0: everything ran (whether or not goals hold),
2: bad usage.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
import warnings
from pathlib import Path

from . import suites
from .runner import Run, Suite, run_suite, store, table


def main(argv: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="suites to run (default: all)")
    parser.add_argument("--list", action="store_true", help="list the suites and what each letter shows")
    parser.add_argument("--quick", action="store_true", help="re-measure a stated sample per letter, within 60 s")
    parser.add_argument("--only", metavar="LETTERS", help="only these letters, e.g. bd")
    parser.add_argument("--all", action="store_true", help="every sample of the op database")
    parser.add_argument("--shards", type=int, default=0, help="processes for the op database (default: one per core)")
    parser.add_argument("--backend", default="plait", help="the torch.compile backend under test (default: plait)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the full report")
    parser.add_argument("--store", action="store_true", help="keep the figures in benchmarks/results")
    given = parser.parse_args(argv)
    known = {s.name: s for s in load()}
    if given.list:
        for suite in known.values():
            print(f"{suite.name}: {suite.about}")
            for letter in suite.letters:
                note = " (only when asked for)" if letter.optional else ""
                print(f"  {letter.key}  {letter.about}{note}\n     goal: {letter.goal}; quick: {letter.sample or 'stored'}")
        return 0
    unknown = [n for n in given.names if n not in known]
    if unknown:
        parser.error(f"no suite is called {unknown[0]!r}; there are: {', '.join(known)}")
    warnings.simplefilter("ignore")
    reports = []
    for name in given.names or known:
        run = Run(given.backend, given.quick, given.all, given.shards)
        reports.append(run_suite(known[name], run, given.only))
        print(table(reports[-1]))
        if given.store:
            print(f"stored in {store(reports[-1])}")
    if given.json:
        given.json.write_text(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1, default=str) + "\n")
    return 0


def load() -> list[Suite]:
    """Every suite, by name."""
    found = sorted(m.name for m in pkgutil.iter_modules(suites.__path__))
    return [importlib.import_module(f".suites.{name}", __package__).SUITE for name in found]


if __name__ == "__main__":
    sys.exit(main())
