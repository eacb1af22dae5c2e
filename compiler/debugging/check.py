"""A user's own check: a command that is given an artifact of each candidate."""

from __future__ import annotations

import logging
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from ...errors import BadCheck
from ...runtime.machine import TARGETS, fitting
from .. import aot
from ..api import allow_ones
from ..export import Exported
from ..source import Targets
from .subject import Build, Subject

log = logging.getLogger(__name__)

_BROKEN = (126, 127)  # what shells give for a command that cannot be run


@dataclass
class Check:
    """Whether a command finds a build good: it exits with 0. `{}` in the command stands for the artifact's path. `said` is
    what became of the last command that did not.

    The artifact takes and gives what the exported program does; without one, the subject's flat inputs and outputs.
    """

    subject: Subject
    command: tuple[str, ...]
    exported: Exported | None = None
    said: str = ""

    @staticmethod
    def of(subject: Subject, command: str, exported: Exported | None = None) -> Check:
        """The check of a command line. Raises BadCheck."""
        try:
            parts = tuple(shlex.split(command))
        except ValueError as error:
            raise BadCheck(command=command, why=str(error)) from error
        if not any("{}" in part for part in parts):
            raise BadCheck(command=command, why="it has no {} where the artifact's path goes")
        return Check(subject, parts, exported)

    def __call__(self, build: Build) -> bool:
        """Write the artifact of a build and run the command. Raises BadCheck where it cannot be run."""
        with tempfile.TemporaryDirectory(prefix="plait-") as folder:
            path = Path(folder) / "candidate.plait"
            aot.save(self._ready(build), path, targets=_here())
            argv = [part.replace("{}", str(path)) for part in self.command]
            try:
                done = subprocess.run(argv, capture_output=True, text=True)
            except OSError as error:
                raise BadCheck(command=shlex.join(self.command), why=str(error)) from error
        log.info("%s: exit code %d\n%s%s", shlex.join(argv), done.returncode, done.stdout, done.stderr)
        if done.returncode in _BROKEN:
            raise BadCheck(command=shlex.join(self.command), why=_ended(done))
        self.said = "" if done.returncode == 0 else _ended(done)
        return done.returncode == 0

    def _ready(self, build: Build) -> aot.Ready:
        state: Mapping[str, torch.Tensor] = {}
        compiled = build.compiled
        if self.exported is not None:
            trees, state = (self.exported.in_tree, self.exported.out_tree), self.exported.state
            compiled = allow_ones(compiled, self.exported.ones)
        else:
            flat = (0,) * len(self.subject.graph.inputs), (0,) * len(self.subject.graph.outputs)
            trees = (pytree.tree_structure((flat[0], {})), pytree.tree_structure(flat[1]))
        options = self.subject.options
        return aot.Ready(compiled, self.subject.graph, build.history, *trees, options=options, state=state)


def _ended(done: subprocess.CompletedProcess[str]) -> str:
    """How a command ended, and the last line that it wrote."""
    how = signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit code {done.returncode}"
    last = [line for text in (done.stderr, done.stdout) for line in text.strip().splitlines()[-1:]]
    return f"{how}: {last[0]}" if last else how


def _here() -> Targets:
    """The most demanding target that this machine runs: what the candidate would run as."""
    return Targets(isas=tuple(fitting({name: asdict(t) for name, t in TARGETS.items()})[:1]))
