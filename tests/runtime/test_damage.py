"""Artifacts that are cut off, altered, foreign, newer or hostile: refused by name, never run."""

import json
import zipfile
from dataclasses import replace

import pytest
import torch
from plait.errors import ArtifactVersion, DamagedArtifact, NotAnArtifact, PlaitError
from plait.runtime import archive
from plait.runtime.artifact import load, write

from tests.runtime.kit import edit, edit_manifest


def rezip(path, out, members, compress=zipfile.ZIP_STORED):
    with zipfile.ZipFile(out, "w", compress) as file:
        for name, content in members:
            file.writestr(name, content)
    return out


def contents(path):
    with zipfile.ZipFile(path) as file:
        return [(name, file.read(name)) for name in file.namelist()]


def test_cut_off_anywhere(path, tmp_path):
    whole = path.read_bytes()
    cut = tmp_path / "cut.plait"
    for size in [*range(0, 200, 7), *range(200, len(whole), len(whole) // 60), len(whole) - 1]:
        cut.write_bytes(whole[:size])
        with pytest.raises((DamagedArtifact, NotAnArtifact)):
            load(cut)


def test_flipped_bytes_are_found_or_harmless(path, tmp_path):
    whole = path.read_bytes()
    opened = archive.Archive(path)
    covered = set()
    for name in (*opened.names, "manifest.json"):
        start = opened.offset(name)
        covered |= {start, start + len(opened.view(name)) // 2, start + len(opened.view(name)) - 1}
    structure = [*range(100), *range(whole.rindex(b"PK\1\2"), len(whole))]
    x = torch.randn(8)
    expected = load(path)(x)
    flipped = tmp_path / "flipped.plait"
    for position in sorted(covered | set(structure)):
        data = bytearray(whole)
        data[position] ^= 0x5A
        flipped.write_bytes(data)
        try:
            found = load(flipped)(x)
        except PlaitError as error:
            assert isinstance(error, (DamagedArtifact, NotAnArtifact))
        else:
            assert position not in covered
            assert torch.equal(found, expected)  # a time stamp, a file mode, …


def test_foreign_files(tmp_path):
    with pytest.raises(NotAnArtifact, match="No such file"):
        load(tmp_path / "nothing")
    with pytest.raises(NotAnArtifact):
        load(tmp_path)
    for name, content in (("empty", b""), ("text", b"hello"), ("half", b"PK\3\4")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(NotAnArtifact):
            load(tmp_path / name)
    with pytest.raises(NotAnArtifact, match=r"it has no manifest.json"):
        load(rezip(None, tmp_path / "z.zip", [("a.txt", "x")]))
    with pytest.raises(NotAnArtifact, match="not one of plait's"):
        load(rezip(None, tmp_path / "z.zip", [("manifest.json", "{}")]))
    torch.save({"a": torch.zeros(3)}, tmp_path / "t.pt")
    with pytest.raises(NotAnArtifact):
        load(tmp_path / "t.pt")


def test_newer_versions_are_refused_by_name(path, monkeypatch, tmp_path):
    members = contents(path)
    data = json.loads(members[0][1])
    data["plait_artifact"] = 7
    members[0] = ("manifest.json", json.dumps(data))
    with pytest.raises(ArtifactVersion, match="format version 7, this plait reads version 1"):
        load(rezip(path, tmp_path / "v.plait", members))
    newer = edit(path, {"plan.json": lambda text: text.replace(b'"version":1', b'"version":9')})
    with pytest.raises(ArtifactVersion, match="format version 9"):
        load(newer)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", "a//b", "..", "C:\\x", "a\\b", "a\0b", "./a", "~/x", ""])
def test_escaping_members(path, tmp_path, name):
    members = [*contents(path)]
    if name:
        safe = name.replace("\0", "_")
        members.append((safe, b"gotcha"))
        out = rezip(path, tmp_path / "e.plait", members)
        if safe != name:
            out.write_bytes(out.read_bytes().replace(safe.encode(), name.encode()))
        with pytest.raises(DamagedArtifact):
            load(out)
    with pytest.raises(ValueError, match="cannot be a member"):
        archive.write_archive(tmp_path / "x", {}, {name: b""})
    assert not list(tmp_path.parent.glob("x"))


def test_links_doubles_compression_and_surplus(path, tmp_path):
    members = contents(path)
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with pytest.raises(DamagedArtifact, match="plain file"):
        load(rezip(path, tmp_path / "d.plait", [*members, (info, b"/etc/passwd")]))
    with pytest.warns(UserWarning, match="Duplicate"), pytest.raises(DamagedArtifact, match="twice"):
        load(rezip(path, tmp_path / "d.plait", [*members, members[1]]))
    with pytest.raises(DamagedArtifact, match="compressed"):
        load(rezip(path, tmp_path / "d.plait", members, zipfile.ZIP_DEFLATED))
    with pytest.raises(DamagedArtifact, match=r"extra.txt: the manifest does not list it"):
        load(rezip(path, tmp_path / "d.plait", [*members, ("extra.txt", b"")]))
    with pytest.raises(DamagedArtifact, match=r"plan.json: the member is missing"):
        load(rezip(path, tmp_path / "d.plait", [m for m in members if m[0] != "plan.json"]))


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("structure"),
        lambda m: m["structure"].update(inputs=3),
        lambda m: m["structure"].update(inputs=m["structure"]["outputs"]),
        lambda m: m.update(targets=[1]),
        lambda m: m.update(targets={"x": {"machine": 1, "requires": []}}),
        lambda m: m.update(weights=None),
        lambda m: m["weights"].update(tied={"a": "b"}),
        lambda m: m["weights"].update(strides={"w": "x"}),
    ],
)
def test_ill_formed_manifests(path, change):
    with pytest.raises(DamagedArtifact, match=r"manifest.json"):
        load(edit_manifest(path, change))


def test_ill_formed_members(path):
    for name, bad in (("plan.json", b"{"), ("plan.json", b"[]"), ("plan.json", b"\xff"), ("plan.json", b"[" * 100_000)):
        with pytest.raises(DamagedArtifact):
            load(edit(path, {name: lambda text, bad=bad: bad}))
    entry = {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}
    for wrong in (
        {"dtype": "F99"},
        {"shape": [9]},
        {"shape": [-8]},
        {"data_offsets": [0, 64]},
        {"data_offsets": [-32, 0]},
        {"shape": None},
    ):
        header = json.dumps({"w": {**entry, **wrong}}).encode()
        data = len(header).to_bytes(8, "little") + header + bytes(32)
        with pytest.raises(DamagedArtifact, match="tensor 'w'"):
            load(edit(path, {"weights.safetensors": lambda text, data=data: data}))
    for data in (b"", b"\xff" * 20, (2).to_bytes(8, "little") + b"[]"):
        with pytest.raises(DamagedArtifact, match="header"):
            load(edit(path, {"weights.safetensors": lambda text, data=data: data}))


def test_writing_is_all_or_nothing(path, parts, tmp_path):
    before = path.read_bytes()

    class Bad(dict):
        def items(self):
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        write(path, replace(parts, weights=Bad()))
    with pytest.raises((TypeError, ValueError)):
        write(path, replace(parts, info={"x": float("nan")}))
    assert path.read_bytes() == before
    assert not list(tmp_path.glob(".m.plait*"))
