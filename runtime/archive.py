"""The container of artifacts and of bundles: a zip of stored (never compressed) members, each at a multiple of 64 bytes.

The manifest (`manifest.json` in an artifact) comes first and holds the size and SHA-256 of every other member. Members are
read through one private memory map of the file, so that weights are paged in when they are used and writes to them stay in
the process.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactVersion, DamagedArtifact, NotAnArtifact

FORMAT = 1
MANIFEST = "manifest.json"
MARK = "plait_artifact"
ALIGNMENT = 64


@dataclass(frozen=True)
class Form:
    """What tells one kind of container from another: the name of the manifest, the key in it that holds the version of the
    format, and the version that is read and written."""

    manifest: str
    mark: str
    version: int


ARTIFACT = Form(MANIFEST, MARK, FORMAT)

Content = bytes | Sequence[Any]
"""The bytes of a member, or buffers whose concatenation they are."""

_LOCAL = struct.Struct("<4sHHHHHLLLHH")
_PADDING = 0xD935  # the id that Android's zipalign gave to extra fields which only align
_SAFE_NAME = re.compile(r"[A-Za-z0-9_.+-]+(/[A-Za-z0-9_.+-]+)*")
_ZIP_ERRORS = (zipfile.BadZipFile, struct.error, ValueError, OverflowError, NotImplementedError, EOFError, IndexError)


def _escapes(name: str) -> bool:
    return not _SAFE_NAME.fullmatch(name) or any(part in (".", "..") for part in name.split("/"))


class Archive:
    """A container opened for reading, verified. `manifest` is its manifest, `names` the other members.

    Raises NotAnArtifact for other files, ArtifactVersion for other formats, DamagedArtifact where a member is missing,
    altered, compressed, or named so that it would leave a folder it is extracted to.
    """

    def __init__(self, path: str | os.PathLike[str], form: Form = ARTIFACT) -> None:
        self.path, self.form = Path(path), form
        try:
            with self.path.open("rb") as file:
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise NotAnArtifact(path=self.path, why=getattr(error, "strerror", None) or str(error)) from None
        if self.map[:4] != b"PK\3\4":
            raise NotAnArtifact(path=self.path, why="it is not a zip file")
        self._view = memoryview(self.map)
        self._spans = self._find_members()
        if form.manifest not in self._spans:
            raise NotAnArtifact(path=self.path, why=f"it has no {self.form.manifest}")
        self.manifest = self._read_manifest()
        self.names = tuple(sorted(self._spans.keys() - {form.manifest}))
        self._verify()

    def offset(self, name: str) -> int:
        """Where a member's bytes begin in `map`."""
        return self._span(name)[0]

    def view(self, name: str) -> memoryview:
        """The bytes of a member, not copied. Raises DamagedArtifact where it is not there."""
        start, end = self._span(name)
        return self._view[start:end]

    def text(self, name: str) -> str:
        """A member as text."""
        try:
            return str(self.view(name), "utf-8")
        except UnicodeDecodeError as error:
            raise DamagedArtifact(part=name, why=str(error)) from None

    def json(self, name: str) -> Any:
        """A member as JSON data."""
        try:
            return json.loads(self.text(name))
        except (ValueError, RecursionError) as error:
            raise DamagedArtifact(part=name, why=f"not JSON: {error}") from None

    def _span(self, name: str) -> tuple[int, int]:
        if name not in self._spans:
            raise DamagedArtifact(part=name, why="the member is missing")
        return self._spans[name]

    def _damaged(self, part: str, why: str) -> DamagedArtifact:
        return DamagedArtifact(part=part, why=why)

    def _find_members(self) -> dict[str, tuple[int, int]]:
        """Name -> (start, end), by the zip's directory; every entry is compared with the header before its bytes."""
        try:
            with zipfile.ZipFile(self.path) as file:
                infos, end = file.infolist(), file.start_dir
        except _ZIP_ERRORS as error:
            if self.map[_LOCAL.size : _LOCAL.size + len(self.form.manifest)] == self.form.manifest.encode():
                raise self._damaged("the zip directory", f"{error}: the file is cut off or altered") from None
            raise NotAnArtifact(path=self.path, why=str(error)) from None
        spans: dict[str, tuple[int, int]] = {}
        for info in infos:
            name = info.orig_filename
            if _escapes(name) or stat.S_ISLNK(info.external_attr >> 16):
                raise self._damaged(repr(name), "a member must be a plain file below the artifact")
            if name in spans:
                raise self._damaged(name, "the member is there twice")
            if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.compress_size != info.file_size:
                raise self._damaged(name, "the member is compressed or encrypted; plait stores members as they are")
            spans[name] = self._span_of(info, end)
        return spans

    def _span_of(self, info: zipfile.ZipInfo, limit: int) -> tuple[int, int]:
        head = info.header_offset
        if head < 0 or head + _LOCAL.size > limit:
            raise self._damaged(info.orig_filename, "its place lies outside the file")
        signature, *_, name_length, extra_length = _LOCAL.unpack_from(self.map, head)
        start = head + _LOCAL.size + name_length + extra_length
        name = self.map[head + _LOCAL.size : head + _LOCAL.size + name_length]
        if signature != b"PK\3\4" or name != info.orig_filename.encode():
            raise self._damaged(info.orig_filename, "its header is not where the directory says")
        if start + info.file_size > limit:
            raise self._damaged(info.orig_filename, "it is cut off")
        return start, start + info.file_size

    def _read_manifest(self) -> dict[str, Any]:
        with zipfile.ZipFile(self.path) as file:
            expected = file.getinfo(self.form.manifest).CRC
        if zlib.crc32(self.view(self.form.manifest)) != expected:
            raise self._damaged(self.form.manifest, "its checksum is wrong")
        manifest = self.json(self.form.manifest)
        if not isinstance(manifest, dict) or type(manifest.get(self.form.mark)) is not int:
            raise NotAnArtifact(path=self.path, why=f"its {self.form.manifest} is not one of plait's")
        if manifest[self.form.mark] != self.form.version:
            raise ArtifactVersion(got=manifest[self.form.mark], expected=self.form.version)
        return manifest

    def _verify(self) -> None:
        members = self.manifest.get("members")
        if not isinstance(members, dict):
            raise self._damaged(self.form.manifest, "it lists no members")
        for name in sorted(members.keys() ^ set(self.names)):
            raise self._damaged(name, "the member is missing" if name in members else "the manifest does not list it")
        for name in self.names:
            found = hashlib.sha256(self.view(name)).hexdigest()
            if not isinstance(members[name], dict) or members[name].get("sha256") != found:
                raise self._damaged(name, "its content is not what the manifest says (SHA-256)")


def _buffers(content: Content) -> Iterator[Any]:
    yield from [content] if isinstance(content, (bytes, bytearray, memoryview)) else content


def _measure(content: Content) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    for part in _buffers(content):
        digest.update(part)
        size += memoryview(part).nbytes
    return {"sha256": digest.hexdigest(), "bytes": size}


def write_archive(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], members: Mapping[str, Content], form: Form = ARTIFACT
) -> None:
    """Write a container: `manifest` (plain data, completed by format and checksums) and `members`.

    Equal arguments give equal bytes. The file appears at `path` complete or not at all.
    """
    for name in members:
        if _escapes(name):
            raise ValueError(f"{name!r} cannot be a member")
    listed = {name: _measure(content) for name, content in sorted(members.items())}
    whole = {**manifest, form.mark: form.version, "members": listed}
    head = json.dumps(whole, indent=1, sort_keys=True, allow_nan=False).encode()
    target = Path(path)
    descriptor, scratch = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file, zipfile.ZipFile(file, "w") as archive:
            _add(archive, form.manifest, head, len(head))
            for name, measured in listed.items():
                _add(archive, name, members[name], measured["bytes"])
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(scratch, 0o666 & ~umask)  # mkstemp gives 0600
        os.replace(scratch, target)
    except BaseException:
        os.unlink(scratch)
        raise


def _add(archive: zipfile.ZipFile, name: str, content: Content, size: int) -> None:
    info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    big = size >= zipfile.ZIP64_LIMIT
    start = archive.fp.tell() + _LOCAL.size + len(name.encode()) + (20 if big else 0)  # type: ignore[union-attr]
    padding = -start % ALIGNMENT
    if 0 < padding < 4:
        padding += ALIGNMENT
    if padding:
        info.extra = struct.pack("<HH", _PADDING, padding - 4) + bytes(padding - 4)
    with archive.open(info, "w", force_zip64=big) as out:
        for part in _buffers(content):
            out.write(part)
