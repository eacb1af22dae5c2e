"""What a user asks of planning, as text: a profile or a model, the layers at which stages begin, schedules."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...errors import CannotStage
from ...passes.stages.layers import Profile
from .measure import Progress, profile_of, read

_NUMBER = re.compile(r"^\d+: ")


def profile_from(src: str, path: str | None, progress: Progress | None = None) -> Profile:
    """The profile that `src` is, a JSON file; or what the layers of the model cost that it names: read from `path` where
    there is such a file, else measured and written there. Raises what `profile_of` raises."""
    return read(src) if src.endswith(".json") else profile_of(src, path, progress=progress)


def cuts_of(profile: Profile, names: Sequence[str]) -> tuple[tuple[int, ...] | None, ...]:
    """For each chain of layers the positions at which stages begin with what is named, None where nothing of it is named: a
    layer, or a module, of which this is the first layer (`mid` names the layer `12: mid.0`). Raises CannotStage."""
    found: list[set[int]] = [set() for _ in profile.chains]
    for name in names:
        places = _places(profile, name)
        if not places:
            known = ", ".join(dict.fromkeys(layer.name for chain in profile.chains for layer in chain[1:])) or "none"
            raise CannotStage(why=f"there is no trained layer {name!r}", way=f"name one of these: {known}")
        if len(places) > 1:
            way = "give layers of the profile different names"
            raise CannotStage(why=f"{len(places)} layers are called {name!r}", way=way)
        chain, at = places[0]
        if at == 0:
            raise CannotStage(why=f"the first stage begins with {name!r} in any case", way="name first layers of the others")
        found[chain].add(at)
    if len({len(at) for at in found if at}) > 1:
        stages = " and ".join(str(len(at) + 1) for at in found)
        raise CannotStage(why=f"the two backbones would have {stages} stages", way="cut both into equally many")
    return tuple(tuple(sorted(at)) if at else None for at in found)


def _places(profile: Profile, name: str) -> list[tuple[int, int]]:
    """(chain, position) of the layers of that name, or else of the first layer of each chain within a module of that name.
    Names of measured layers begin with their numbers."""
    layers = [(c, i, layer.name) for c, chain in enumerate(profile.chains) for i, layer in enumerate(chain)]
    if exact := [(c, i) for c, i, known in layers if known == name]:
        return exact
    within = [(c, i) for c, i, known in layers if f"{_NUMBER.sub('', known)}.".startswith(f"{name}.")]
    return [(c, min(i for d, i in within if d == c)) for c in dict.fromkeys(c for c, _ in within)]


def schedules_of(profile: Profile, names: Sequence[str]) -> tuple[str, ...]:
    """The schedules to choose from: those that were named, or what there is for so many backbones. Raises CannotStage."""
    two = len(profile.chains) == 2
    known = ("bidirectional",) if two else ("1f1b", "gpipe", "zero-bubble")
    if wrong := [name for name in names if name not in known]:
        why = f"{wrong[0]} is no schedule for {'two backbones' if two else 'one backbone'}"
        raise CannotStage(why=why, way=f"name {' or '.join(known)}")
    return tuple(dict.fromkeys(names)) or known[:1]


__all__ = ["cuts_of", "profile_from", "schedules_of"]
