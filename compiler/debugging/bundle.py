"""Bundles: a failing program in one file that others can replay, reduce and bisect.

A bundle is a zip without pickle: `bundle.json` (versions, machine, options, the failure), `graph.txt` (the graph before the
pass that failed, see `ir/text.py`), inputs and constants as safetensors. Weights are only in it when they were asked for;
otherwise tensors of the same shape, layout, mean, deviation and range take their place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import safetensors
import safetensors.torch
import torch

from ...errors import ArtifactVersion, BundleVersion, DamagedArtifact, DamagedBundle, NotABundle, NotAnArtifact
from ...ir import Graph, parse_graph, verify
from ...ir.verify import verify_types
from ...passes.base import Step
from ...runtime.archive import Archive, Content, Form, write_archive
from ..env import environment
from ..options import Options
from .failure import KINDS, Failure
from .stored import all_constants, described, pass_data, pass_from, restored, running, stored
from .subject import Subject, failure_apart
from .walk import Level

BUNDLE = Form("bundle.json", "plait_bundle", 1)
#: Inputs of up to so many bytes together are stored unasked.
SMALL = 1 << 20
#: Constants of up to so many elements are no weights and are always stored.
FEW = 16
_HERE = (
    "passes",
    "pass_options",
    "print_after",
    "dump_dir",
    "bisect_limit",
)  # options that are told otherwise, or of no use


def write_bundle(
    path: str | Path, subject: Subject, failure: Failure, *, step: Step | None = None, weights: bool = False
) -> Path:
    """Write a failing subject to a file and return its path.

    `step` is the pass that failed, where it is known; the graph after it goes into the bundle too. Inputs that take up to
    1 MiB together and are no parameters are stored; with `weights` all of them are, and constants too. Raises CannotBundle,
    OSError.
    """
    path = Path(path)
    graph, constants = subject.graph, all_constants(subject.graph)
    given = [x for x in subject.inputs if isinstance(x, torch.Tensor)]
    small = sum(x.nbytes for x in given) <= SMALL
    keep = [weights or (small and not isinstance(x, torch.nn.Parameter)) for x in subject.inputs]
    whole = {n for n, t in constants.items() if weights or t.numel() <= FEW}
    options = {f.name: getattr(subject.options, f.name) for f in dataclasses.fields(Options) if f.name not in _HERE}
    manifest = {
        **_versions(),
        "name": subject.name,
        "level": subject.level,
        "options": {**options, **{f"{p}.{o}": value for p, o, value in subject.options.pass_options}},
        "passes": [pass_data(p) for p in running(subject.options.passes, subject.level)],
        "failure": dataclasses.asdict(failure),
        "failed_pass": step.pass_name if step is not None else "",
        "go_on": [f"plait {command} {path.name}" for command in ("replay", "reduce", "bisect")],
        "inputs": [described(x, i, stored=k) for i, (x, k) in enumerate(zip(subject.inputs, keep, strict=True))],
        "constants": {n: described(t, i, stored=n in whole) for i, (n, t) in enumerate(constants.items(), len(keep))},
    }
    kept = {str(i): x for i, x in enumerate(subject.inputs) if keep[i] and isinstance(x, torch.Tensor)}
    members: dict[str, Content] = {"graph.txt": str(graph).encode()}
    if step is not None and step.changed:
        members["after.txt"] = str(step.after).encode()
    if kept:
        members["inputs.safetensors"] = stored(kept)
    if whole:
        members["constants.safetensors"] = stored({n: constants[n] for n in whole})
    write_archive(path, manifest, members, BUNDLE)
    return path


def _versions() -> dict[str, Any]:
    found = environment()
    machine = {k: found[k] for k in ("python", "platform", "processor", "cxx", "devices") if k in found}
    return {"plait": found["plait"], "torch": found["torch"], "machine": machine}


@dataclass(frozen=True)
class Replayed:
    """What a bundle did here: the failure that it holds, and the one that showed, None for none."""

    expected: Failure
    found: Failure | None

    @property
    def same(self) -> bool:
        """True where the same failure shows."""
        return self.expected.same(self.found)

    def __str__(self) -> str:
        if self.found is None:
            return f"it does not fail any more; it was: {self.expected}"
        return f"the same failure: {self.found}" if self.same else f"another failure: {self.found}\nit was: {self.expected}"


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read. `text` is the graph, `after` the graph after the pass that failed ("" where it is not known),
    `manifest` what `bundle.json` says."""

    path: Path
    manifest: Mapping[str, Any]
    text: str
    after: str
    inputs: tuple[Any, ...]
    constants: Mapping[str, torch.Tensor]
    failure: Failure
    level: Level
    name: str

    def graph(self) -> Graph:
        """The graph before the pass that failed. Raises BadText, UnknownOp, InvalidGraph."""
        graph = parse_graph(self.text, self.constants)
        verify(graph)
        verify_types(graph)
        return graph

    def subject(self) -> Subject:
        """The failing program. Raises what `graph` raises, DamagedBundle, PassNotFound, and the errors of options."""
        graph, given = self.graph(), self.manifest.get("options")
        if len(graph.inputs) != len(self.inputs):
            raise DamagedBundle(part="inputs", why=f"there are {len(self.inputs)}, the graph takes {len(graph.inputs)}")
        listed = self.manifest.get("passes")
        if not isinstance(given, dict) or not isinstance(listed, list):
            raise DamagedBundle(part=BUNDLE.manifest, why="its options are ill-formed")
        options = Options.of({**given, "passes": [pass_from(p) for p in listed]})
        return Subject(graph, self.inputs, options, self.level, self.name)

    def replay(self) -> Replayed:
        """Compile and run it again, in a process of its own where one has died of it. Raises what `subject` raises."""
        subject = self.subject()
        found = failure_apart(subject) if self.failure.kind == "crashes" else subject.failure()
        return Replayed(self.failure, found)


def read_bundle(path: str | Path) -> Bundle:
    """Read a bundle; nothing of it is run. Raises NotABundle, BundleVersion, DamagedBundle."""
    path = Path(path)
    with _own_errors(path):
        archive = Archive(path, BUNDLE)
        manifest = archive.manifest
        text = archive.text("graph.txt")
        after = archive.text("after.txt") if "after.txt" in archive.names else ""
        inputs, constants = manifest.get("inputs"), manifest.get("constants")
        if not isinstance(inputs, list) or not isinstance(constants, dict):
            raise DamagedBundle(part=BUNDLE.manifest, why="its lists of tensors are ill-formed")
        tensors = _tensors(archive, "inputs.safetensors")
        given = tuple(restored(spec, tensors.get(str(i)), f"input {i}") for i, spec in enumerate(inputs))
        tensors = _tensors(archive, "constants.safetensors")
        named = {n: restored(spec, tensors.get(n), f"constant {n}") for n, spec in constants.items()}
    level, name = manifest.get("level"), manifest.get("name")
    if level not in get_args(Level):
        raise DamagedBundle(part=BUNDLE.manifest, why=f"{level!r} is no level of a graph")
    if not isinstance(name, str):
        raise DamagedBundle(part=BUNDLE.manifest, why="it names no program")
    return Bundle(path, manifest, text, after, given, named, _failure(manifest), cast("Level", level), name)


@contextmanager
def _own_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except NotAnArtifact as error:
        raise NotABundle(path=path, why=error.fields["why"]) from None
    except ArtifactVersion as error:
        raise BundleVersion(got=error.fields["got"], expected=error.fields["expected"]) from None
    except DamagedArtifact as error:
        raise DamagedBundle(part=error.fields["part"], why=error.fields["why"]) from None


def _tensors(archive: Archive, name: str) -> dict[str, torch.Tensor]:
    if name not in archive.names:
        return {}
    try:
        return safetensors.torch.load(bytes(archive.view(name)))
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise DamagedBundle(part=name, why=str(error)) from error


def _failure(manifest: Mapping[str, Any]) -> Failure:
    found = manifest.get("failure")
    kinds: dict[str, type] = {"kind": str, "what": str, "op": str, "band": int, "detail": str}
    if not isinstance(found, dict) or found.keys() != kinds.keys():
        raise DamagedBundle(part=BUNDLE.manifest, why="it names no failure")
    if any(type(found[k]) is not kind for k, kind in kinds.items()) or found["kind"] not in KINDS:
        raise DamagedBundle(part=BUNDLE.manifest, why="its failure is ill-formed")
    return Failure(**found)
