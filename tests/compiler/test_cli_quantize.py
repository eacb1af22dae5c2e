"""`plait quantize` on a small model, from SRC and calibration data to artifacts, tables, pages and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plait as package
import pytest
import torch
from click.testing import CliRunner, Result
from plait.compiler.cli import main
from plait.compiler.commands import quantize as command
from plait.passes.quantize.search import GroupSearch
from plait.runtime.artifact import load
from safetensors.torch import save_file

from tests.compiler.factories import WORDS

SEED = 3
SRC = "quantize_factories:words"
QUICK = ("--target", "cpu:x86-64-v3", "--want", "smaller")
LAYERS = ["up", "down", "head"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "quantize_factories.py").write_text(WORDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    save_file({"tokens": tokens(12)}, tmp_path / "tokens.safetensors")
    return tmp_path


def tokens(samples: int) -> torch.Tensor:
    return torch.randint(0, 40, (samples, 8), generator=torch.Generator().manual_seed(SEED))


def model() -> Any:
    scope: dict[str, Any] = {}
    exec(WORDS, scope)
    return scope["words"]()[0].eval()


def plait(*args: str) -> Result:
    return CliRunner().invoke(main, ["quantize", SRC, *args], catch_exceptions=False)


def found(*args: str) -> dict[str, Any]:
    result = plait(*args, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def calibrated(*args: str) -> dict[str, Any]:
    return found("--calib", "tokens.safetensors", *QUICK, *args)


def formats(data: dict[str, Any]) -> dict[str, str]:
    return {layer["name"]: layer["format"] for layer in data["layers"]}


# -- what is made -------------------------------------------------------------------------------------------------------


def test_an_artifact_that_runs(folder: Path) -> None:
    data = calibrated("--scheme", "awq-w4g32", "-o", "w.plait")
    assert formats(data) == dict.fromkeys(LAYERS, "w4g32") and data["skipped"] == []
    assert all(layer["loss"] <= layer["nearest_loss"] for layer in data["layers"])
    assert data["batches"] == 6, "samples are joined to batches of the size that the model is captured on"
    x = tokens(2)
    got, wanted = load(folder / "w.plait")(x), model()(x)
    relative = ((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()).item()
    assert 0.3 * data["error"] < relative < 3 * data["error"] < 0.3
    run = CliRunner().invoke(main, ["run", "w.plait", "--random", "--compare", "graph"])
    assert run.exit_code == 0, run.output
    assert not Path("w.plait.partial").exists()


def test_what_is_said(folder: Path) -> None:
    result = plait("--calib", "tokens.safetensors", *QUICK, "--ignore", "head", "-o", "w.plait")
    assert result.exit_code == 0 and result.stderr == "", result.stderr
    for text in (
        "nearest", "u4g64", "groups of 64: 128 do not divide 64", "2 layers of", "bits for each weight",
        "embeddings 10.0 KiB (1), linear layers 10.0 KiB (1), others", "error of the results",
        "6 batches of tokens.safetensors", "generated kernels", "wrote w.plait",
    ):  # fmt: skip
        assert text in result.stdout, text


def test_sizes_of_what_stays_float_are_apart() -> None:
    data = calibrated("--scheme", "rtn-w8g32", "--ignore", "re:he", "--targets", "Linear")
    assert Path("words.plait").exists()
    roles = {one["name"]: (one["role"], one["bytes"]) for one in data["kept"]}
    assert roles["embed.weight"] == ("embedding", 40 * 64 * 4) and roles["head.weight"] == ("linear layer", 40 * 64 * 4)
    assert roles["norm.bias"] == ("other", 64 * 4) and not any("codes" in name for name in roles)
    assert data["bytes"] == sum(layer["bytes"] for layer in data["layers"])
    assert data["float_bytes"] == 2 * 64 * 128 * 4 and data["bits_per_weight"] == pytest.approx(8 + 24 / 32)


def test_layers_can_be_named_and_have_formats_of_their_own() -> None:
    data = calibrated("--target-layers", "up", "--target-layers", "re:h", "--layer", "head=w8g64", "--layer", "re:.=w3g32")
    assert formats(data) == {"up": "w3g32", "head": "w8g64"}


def test_layers_that_would_not_gain_are_skipped_with_a_reason() -> None:
    data = calibrated("--layer", "head=w8g1")
    assert [one["name"] for one in data["skipped"]] == ["head"] and "bytes" in data["skipped"][0]["why"]
    assert formats(calibrated("--layer", "head=w8g1", "--want", "any")).keys() == set(LAYERS)


def test_bytes_without_calibration_data() -> None:
    data = found("--scheme", "w8a8", *QUICK)
    assert formats(data) == dict.fromkeys(LAYERS, "w8a8") and data["calibration"] is None and data["batches"] == 1


def test_dynamic_sizes(folder: Path) -> None:
    calibrated("--scheme", "gptq-w4g32", "--dynamic", "tokens:0=1..64", "-o", "w.plait")
    loaded = load(folder / "w.plait")
    for rows in (1, 2, 7):
        torch.testing.assert_close(loaded(tokens(7)[:rows]), loaded(tokens(7))[:rows])


def test_an_exported_program(folder: Path) -> None:
    torch.export.save(torch.export.export(model(), (tokens(2),)), folder / "words.pt2")
    arguments = ["quantize", "words.pt2", "--calib", "tokens.safetensors", *QUICK, "--scheme", "rtn-w4g32", "--json"]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and len(json.loads(result.stdout)["layers"]) == 3, result.stderr


def test_other_tools_checkpoints(folder: Path) -> None:
    data = calibrated("--scheme", "awq-w4g32", "--export-awq", "awq", "--export-compressed", "packed", "-o", "w.plait")
    assert data["checkpoints"] == ["awq", "packed"]
    for name in data["checkpoints"]:
        filled = model()
        package.load_quantized(filled, folder / name)
        torch.testing.assert_close(filled(tokens(2)), load(folder / "w.plait")(tokens(2)), rtol=1e-3, atol=1e-3)


# -- calibration data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["npz", "npy", "pt"])
def test_calibration_files(kind: str, folder: Path) -> None:
    path, x = folder / f"tokens.{kind}", tokens(6)
    if kind == "pt":
        torch.save([x[:2], x[2:4], x[4:]], path)
    elif kind == "npz":
        np.savez(path, tokens=x.numpy())
    else:
        np.save(path, x.numpy())
    arguments = ("--table", "--rows", "1", "--format", "w4g32", "--targets", "head", "--want", "smaller")
    error = {o["format"]: o["error"] for o in found("--calib", str(path), *arguments)["options"]}["w4g32"]
    same = {o["format"]: o["error"] for o in found("--calib", "tokens.safetensors", "--samples", "6", *arguments)["options"]}
    assert error == pytest.approx(same["w4g32"])
    assert error != pytest.approx(found("--calib", str(path), "--samples", "2", *arguments)["options"][0]["error"])


@pytest.mark.parametrize(
    ("tensors", "text"),
    [
        ({"tokens": tokens(1)}, "1 samples"),
        ({"tokens": tokens(4)[:, :5].contiguous()}, "[2, 5]"),
        ({"tokens": tokens(4), "mask": tokens(4)}, "the model takes tokens"),
        ({"tokens": tokens(4).float()}, "float32"),
    ],
)
def test_calibration_data_that_does_not_fit(tensors: dict[str, torch.Tensor], text: str, folder: Path) -> None:
    save_file(tensors, folder / "bad.safetensors")
    result = plait("--calib", "bad.safetensors", *QUICK)
    assert result.exit_code == 2 and "P0903" in result.stderr and text in result.stderr
    assert not Path("words.plait.partial").exists() and not Path("words.plait").exists()


def test_what_searches_needs_calibration_data() -> None:
    for arguments, what in (((), "awq-w4g128"), (("--scheme", "rtn-w4g32", "--budget", "bytes=30%"), "--budget"),
                            (("--table",), "--table")):  # fmt: skip
        result = plait(*arguments)
        assert result.exit_code == 2 and f"{what} needs calibration data" in result.stderr


# -- choosing -----------------------------------------------------------------------------------------------------------


def test_the_table_shows_what_each_format_costs() -> None:
    arguments = ("--calib", "tokens.safetensors", "--table", "--rows", "1,4", "--format", "w4g32", "--format", "w8g64",
                 "--want", "smaller")  # fmt: skip
    options = found(*arguments)["options"]
    assert [(o["layer"], o["format"]) for o in options] == [(n, f) for n in LAYERS for f in ("w4g32", "w8g64", "float")]
    for four, eight, full in zip(options[::3], options[1::3], options[2::3], strict=True):
        assert four["error"] > eight["error"] > full["error"] == 0 and four["bytes"] < eight["bytes"] < full["bytes"]
        assert all(
            o["microseconds"].keys() == {"1", "4"} and min(o["microseconds"].values()) > 0 for o in (four, eight, full)
        )
    text = plait(*arguments).stdout
    assert "µs (rows)" in text and "w8g64" in text
    assert not list(Path().glob("*.plait*")), "nothing is written"


def test_a_budget_of_bytes() -> None:
    data = calibrated("--budget", "bytes=25%", "--format", "w4g32", "--format", "w8g32", "--rows", "1")
    assert data["bytes"] <= 0.25 * data["float_bytes"]
    assert set(formats(data).values()) == {"w4g32", "w8g32"} and data["plan"]["budget"] == "bytes=25%"
    chosen = {o["layer"]: o["format"] for o in data["plan"]["options"] if o["chosen"]}
    assert chosen == formats(data)


def test_a_budget_of_error() -> None:
    data = calibrated("--budget", "error=0.02", "--rows", "1")
    assert 0 < data["error"] <= 0.02 and data["plan"]["error"] == data["error"]


# -- the page -----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Tables by id: rows of cells' texts. Raises where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [values[name] or "" for name in ("src", "href") if name in values]
        if tag == "table":
            self.rows = self.tables.setdefault(values.get("id") or values["class"] or "", [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data.strip()


def test_a_page_about_it(folder: Path) -> None:
    budget = ("--budget", "bytes=25%", "--format", "w4g32", "--format", "w8g1", "--rows", "1")
    data = calibrated(*budget, "--report", "w.html")
    page = Page((folder / "w.html").read_text())
    assert page.links == [], "it refers to nothing outside itself"
    assert [row[0] for row in page.tables["layers"]] == ["layer", *LAYERS]
    assert [row[1] for row in page.tables["layers"][1:]] == [layer["type"] for layer in data["layers"]]
    options = page.tables["options"][1:]
    assert [row[0] for row in options if row[0]] == LAYERS and len(options) == 9
    assert any("bytes, the weight" in row[-1] for row in options), "why a format is out of the question"
    assert dict(map(lambda row: row[:2], page.tables["totals"]))["Budget"] == "bytes=25%"


def test_a_page_lists_layers_that_stay_float(folder: Path) -> None:
    calibrated("--scheme", "rtn-w4g32", "--layer", "head=w8g1", "--report", "w.html")
    page = Page((folder / "w.html").read_text())
    assert [row[0] for row in page.tables["skipped"]] == ["layer", "head"] and "options" not in page.tables


# -- interruptions ------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`interrupted(n)`: somebody presses Ctrl-C when n groups are finished; 0: nobody does."""

    def press(after: int) -> None:
        @contextmanager
        def bar(_: str) -> Iterator[Callable[[int, int, str], None]]:
            def told(done: int, _of: int, _last: str) -> None:
                if done == after:
                    raise KeyboardInterrupt

            yield told

        monkeypatch.setattr(command, "progress_bar", bar)

    return press


def test_an_interrupted_command_goes_on(interrupted: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--calib", "tokens.safetensors", *QUICK, "--scheme", "awq-w4g32")
    whole = found(*arguments, "-o", "whole.plait")
    interrupted(2)
    result = plait(*arguments, "-o", "w.plait")
    assert result.exit_code == 130 and result.stdout == ""
    assert "kept in w.plait.partial: the same command goes on from there" in result.stderr
    assert len(list(Path("w.plait.partial").glob("group-*"))) == 2 and not Path("w.plait").exists()

    other = plait(*arguments, "--scheme", "awq-w3g32", "-o", "w.plait")
    assert other.exit_code == 2 and "P0906" in other.stderr and "kept in" not in other.stderr

    searched: list[str] = []
    search = GroupSearch.run
    monkeypatch.setattr(GroupSearch, "run", lambda s, m: (searched.extend(one.name for one in s.wanted), search(s, m))[1])
    interrupted(0)
    resumed = found(*arguments, "-o", "w.plait")
    assert len(searched) == 1 and resumed["layers"] == whole["layers"]
    assert not Path("w.plait.partial").exists()


def test_nothing_is_kept_where_that_is_not_wanted(interrupted: Callable[[int], None]) -> None:
    arguments = ("--calib", "tokens.safetensors", *QUICK, "--scheme", "awq-w4g32")
    interrupted(2)
    result = plait(*arguments, "--no-resume")
    assert result.exit_code == 130 and "kept" not in result.stderr
    assert not list(Path().glob("*.partial"))


def test_a_folder_of_ones_own_is_kept(folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("mine")
    calibrated("--scheme", "rtn-w4g32", "--resume", "mine")
    assert (folder / "mine" / "notes.txt").exists() and len(list((folder / "mine").glob("group-*"))) == 3


# -- mistakes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("--scheme", "awq-w9"), 2, "P0905"),
        (("--layer", "head=4bits"), 2, "P0203"),
        (("--budget", "bytes=few"), 2, "P0403"),
        (("--budget", "bytes=1"), 2, "P0907"),
        (("--budget", "bytes=30%", "--layer", "head=w8g64"), 2, "P0403"),
        (("--budget", "bytes=30%", "--format", "w1"), 2, "P0905"),
        (("--targets", "lm_head"), 2, "P0904"),
        (("--target", "gpu"), 2, "P0703"),
        (("--option", "nonsense=1"), 2, "P0402"),
        (("--rows", "1,x"), 2, "--rows"),
        (("--resume", "a", "--no-resume"), 2, "either --resume or --no-resume"),
        (("--table", "-o", "w.plait"), 2, "leave -o out"),
        (("--calib", "absent.npz"), 2, "absent.npz"),
        (("--report", "absent/w.html"), 2, "--report"),
        (("--scheme", "rtn-w4g20", "--want", "any", "--option", "strict_kernels"), 3, "P0908"),
        (("--scheme", "rtn-w3g32", "--export-awq", "awq"), 2, "P0912"),
    ],
)
def test_mistakes_have_an_exit_code_and_a_way_out(arguments: tuple[str, ...], code: int, text: str) -> None:
    result = plait("--calib", "tokens.safetensors", *QUICK, "--rows", "1", *arguments)
    assert result.exit_code == code and text in result.stderr and result.stdout == "", result.stderr
