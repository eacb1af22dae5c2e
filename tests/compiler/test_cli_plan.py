"""`plait plan`: what each option does, what is printed and written, and what is said of wrong input."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from plait.compiler.cli import main
from plait.compiler.stages import request
from plait.compiler.stages.request import cuts_of, profile_from, schedules_of
from plait.compiler.stages.summary import Summary
from plait.cost.microbatches import Schedule
from plait.errors import BadProfile, CannotStage
from plait.passes.stages.layers import Layer, Links, Profile
from plait.passes.stages.plan import data_parallel, plan

from tests.compiler.stage_profiles import chain, curve, profile

DOCS = Path(__file__).parent.parent.parent / "docs"
QUICK = ("--stages", "2", "--groups", "1", "--microbatches", "4")
NAMES = ["down.0", "down.1", "down.2", "up.0", "up.1", "up.2"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    made = {"one": profile(), "bare": profile(frozen=False), "two": profile(second=True), "fast": profile(links=Links())}
    for name, one in made.items():
        Path(f"{name}.json").write_text(json.dumps(one.to_json()))
    return tmp_path


def plait(*args: str) -> Result:
    return CliRunner().invoke(main, ["plan", *args], catch_exceptions=False)


def told(*args: str, src: str = "one.json", devices: int = 4, batch: int = 32) -> dict[str, Any]:
    result = plait(src, "--devices", str(devices), "--global-batch", str(batch), *args, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def refused(*args: str, src: str = "one.json", devices: str = "4", batch: str = "32") -> str:
    result = plait(src, "--devices", devices, "--global-batch", batch, *args)
    assert result.exit_code == 2 and result.stdout == "", result.stdout
    return result.stderr


# -- what is printed ----------------------------------------------------------------------------------------------------


def test_json_says_all_of_the_plan() -> None:
    data = told(*QUICK)
    assert data["plan"] == "2 stages, 2 devices each, 4 micro-batches of 8, 1f1b"
    assert (data["devices"], data["batch"], data["groups"], data["memory"]) == (4, 32, 1, None)
    assert data["microbatches"] * data["samples"] * data["groups"] == 32
    assert [name for stage in data["stages"] for name in stage["layers"]] == NAMES
    assert data["cuts"] == [[data["stages"][1]["layers"][0]]]
    assert [rank["devices"] for rank in data["ranks"]] == [stage["devices"] for stage in data["stages"]]
    assert 0 < data["bubble_share"] < data["bubble_share_unfilled"] < 1 and 0 < data["frozen_share_hidden"] <= 1
    assert data["seconds"] == data["plain_seconds"] and data["conditioned_seconds"] is None
    assert data["bound_seconds"] > 0 and all(one["seconds"] >= data["seconds"] for one in data["alternatives"])
    assert all(rank["memory"] > 0 for rank in data["ranks"])
    done = [rank["frozen"] for rank in data["ranks"]]
    rows = [max(piece["high"] for piece in pieces) for pieces in done]
    assert sum(2 * n for n in rows) >= 32, "every row of the next batch is on some device"
    assert {piece["layer"] for pieces in done for piece in pieces} == {"text.0", "text.1", "image"}


def test_the_actions_of_ranks_are_a_schedule() -> None:
    data = told("--schedule", "zero-bubble", *QUICK)
    lines = [",".join(rank["actions"]) for rank in data["ranks"]]
    Path("schedule.csv").write_text("\n".join(lines))
    assert Schedule.read("schedule.csv").microbatches == data["microbatches"]


def test_text_says_the_same() -> None:
    text, data = plait("one.json", "--devices", "4", "--global-batch", "32").stdout, told()
    assert text.startswith(data["plan"] + "\n") and "down.0 to down.1 (2)" in text
    assert re.search(r"^step +\d+ ms$", text, re.M) and "of their time in bubbles" in text
    assert len(data["alternatives"]) > 2
    assert f"{100 * data['bubble_share']:.1f} % of the devices' time, {100 * data['bubble_share_unfilled']:.1f} %" in text
    for one in (*data["alternatives"], *data["baselines"]):
        assert one["plan"] in text
    assert "does not fit" not in text and "expected to be faster" not in text


def test_text_without_frozen_layers_says_nothing_of_them() -> None:
    text = plait("bare.json", "--devices", "4", "--global-batch", "32", *QUICK).stdout
    assert "frozen" not in text and "bubbles" in text


def test_a_step_with_self_conditioning_has_two_times() -> None:
    Path("cond.json").write_text(json.dumps(profile(condition=0.5).to_json()))
    data = told(*QUICK, src="cond.json")
    assert data["seconds"] == pytest.approx((data["plain_seconds"] + data["conditioned_seconds"]) / 2)
    assert any("C" in action for action in data["ranks"][0]["conditioned_actions"])
    text = plait("cond.json", "--devices", "4", "--global-batch", "32", *QUICK).stdout
    assert "on average; plain" in text and "self-conditioned (50.0 % of all)" in text


# -- baselines ----------------------------------------------------------------------------------------------------------


def test_baselines_are_data_parallelism_and_equal_layers() -> None:
    parallel, equal = told(*QUICK)["baselines"]
    assert parallel["plan"] == "plain data parallelism"
    assert parallel["seconds"] == pytest.approx(data_parallel(profile(), 4, 32)[0])
    assert equal["plan"].startswith("equal layers: ") and equal["plan"].endswith(", gpipe")
    assert parallel["fits"] and equal["fits"]


def test_baselines_that_do_not_fit_say_so() -> None:
    args = ("--memory", "3GB", *QUICK)
    parallel, equal = told(*args)["baselines"]
    assert not parallel["fits"] and parallel["memory"] == pytest.approx(6 * (4 * 4e7 + 8 * 1e8))
    assert not equal["fits"] and equal["memory"] > 3e9
    assert "does not fit: 5.4 GiB" in plait("one.json", "--devices", "4", "--global-batch", "32", *args).stdout


def test_where_data_parallelism_is_faster_that_is_said() -> None:
    text = plait("fast.json", "--devices", "4", "--global-batch", "32", *QUICK).stdout
    assert "plain data parallelism is expected to be faster" in text


def test_one_device_has_no_equal_stages_to_compare_with() -> None:
    assert [one["plan"] for one in told(devices=1)["baselines"]] == ["plain data parallelism"]


# -- options ------------------------------------------------------------------------------------------------------------


def test_stages_microbatches_and_groups_are_as_asked() -> None:
    data = told("--stages", "2", "--microbatches", "4", "--groups", "2")
    assert (len(data["stages"]), data["microbatches"], data["groups"], data["samples"]) == (2, 4, 2, 4)


def test_cuts_are_where_they_were_asked_for() -> None:
    data = told("--cut", "up.0", "--cut", "down.2", "--groups", "1")
    assert data["cuts"] == [["down.2", "up.0"]]
    assert [stage["layers"] for stage in data["stages"]] == [NAMES[:2], NAMES[2:3], NAMES[3:]]


def test_schedules_are_those_that_were_named() -> None:
    assert told(*QUICK)["schedule"] == "1f1b"
    assert told("--schedule", "gpipe", *QUICK)["schedule"] == "gpipe"
    data = told("--schedule", "1f1b", "--schedule", "zero-bubble", "--stages", "4", "--no-fill")
    assert {one["plan"].rpartition(", ")[2] for one in data["alternatives"]} == {"1f1b", "zero-bubble"}
    assert data["schedule"] == "zero-bubble"


def test_two_backbones_run_in_opposite_directions() -> None:
    data = told(*QUICK, src="two.json")
    assert data["schedule"] == "bidirectional"
    assert [stage["rank"] for stage in data["stages"]] == [0, 1, 1, 0]
    assert data["baselines"][1]["plan"].endswith("bidirectional")
    assert told("--cut", "fine.1", "--schedule", "bidirectional", *QUICK, src="two.json")["cuts"][1] == ["fine.1"]
    text = plait("two.json", "--devices", "4", "--global-batch", "32", *QUICK).stdout
    assert re.search(r"^stage +rank +devices +layers", text, re.M)


def test_equal_replicas() -> None:
    args = ("--stages", "3", "--groups", "1", "--microbatches", "4")

    def replicas(how: str) -> set[int]:
        return {rank["devices"] for rank in told("--replicas", how, *args, src="fast.json")["ranks"]}

    assert replicas("any") == {1, 2} and replicas("equal") == {1}
    text = plait("fast.json", "--devices", "4", "--global-batch", "32", "--replicas", "equal", *args).stdout
    assert re.search(r"^devices +3 of 4$", text, re.M), "a device that has nothing to do is not passed over in silence"


def test_bubbles_are_filled_unless_that_is_not_wanted() -> None:
    def filled(*args: str) -> dict[str, Any]:
        return told(*QUICK, *args, src="fast.json")

    full, whole, long, none = filled(), filled("--no-partial"), filled("--least-bubble", "60"), filled("--no-fill")
    assert none["frozen_share_hidden"] == 0 < whole["frozen_share_hidden"] <= full["frozen_share_hidden"]
    assert long["frozen_share_hidden"] < full["frozen_share_hidden"]
    assert none["seconds"] > full["seconds"]

    def bubbles(data: dict[str, Any]) -> list[list[dict[str, Any]]]:
        return [[piece for piece in rank["frozen"] if piece["bubble"] is not None] for rank in data["ranks"]]

    rows = [max(piece["high"] for piece in rank["frozen"]) for rank in whole["ranks"]]
    assert all(
        (piece["low"], piece["high"]) == (0, n) for n, pieces in zip(rows, bubbles(whole), strict=True) for piece in pieces
    )
    assert not any(bubbles(none))


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GB", 80e9), ("80GiB", 80 * 2**30), ("0.5TB", 0.5e12), ("80 gb", 80e9), ("30000000000", 3e10), ("1Ti", 2.0**40)],
)
def test_memory_is_read_with_its_unit(text: str, size: float) -> None:
    assert told("--memory", text, *QUICK)["memory"] == size


@pytest.mark.parametrize("text", ["-80GB", "0GB", "80XB", "GB", "much", ""])
def test_memory_that_is_none(text: str) -> None:
    assert "such as 80GB, 80GiB or 0.5TB" in refused("--memory", text)


def test_memory_decides() -> None:
    free, tight = told("--stages", "4"), told("--memory", "1.5GB", "--stages", "4")
    assert max(rank["memory"] for rank in free["ranks"]) > 1.5e9 >= max(rank["memory"] for rank in tight["ranks"])
    assert tight["seconds"] > free["seconds"] and tight["memory"] == 1.5e9
    assert "P1403" in refused("--memory", "100MB", *QUICK)


def test_files_are_written() -> None:
    args = ("-o", "plan.json", "--trace", "trace.json", "--timeline", "plan.svg", *QUICK)
    data = told(*args)
    assert json.loads(Path("plan.json").read_text()) == data
    assert json.loads(Path("trace.json").read_text())["traceEvents"]
    assert Path("plan.svg").read_text().startswith("<svg")
    told("--timeline", "plan.HTML", *QUICK)
    assert Path("plan.HTML").read_text().startswith("<!doctype html>")
    text = plait("one.json", "--devices", "4", "--global-batch", "32", *args).stdout
    assert text.endswith("wrote plan.json, trace.json, plan.svg\n")


def test_a_profile_that_was_measured_before_is_read() -> None:
    data = told("--profile", "one.json", *QUICK, src="no.such:model")
    assert data["source"] == "no.such:model" and data | {"source": "one.json"} == told(*QUICK)


def test_a_model_is_measured_where_there_is_no_profile_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def measured(src: str, path: str | None, *, progress: Any) -> Profile:
        progress(0, 1, "layers")
        asked.append((src, path))
        return profile()

    monkeypatch.setattr(request, "profile_of", measured)
    assert told("--profile", "new.json", *QUICK, src="models.unet:make")["plan"] == told(*QUICK)["plan"]
    assert told(*QUICK, src="models.unet:make")["source"] == "models.unet:make"
    assert asked == [("models.unet:make", "new.json"), ("models.unet:make", None)]


# -- wrong input --------------------------------------------------------------------------------------------------------


def test_options_that_contradict_each_other() -> None:
    assert "leave --profile out" in refused("--profile", "two.json")
    assert "contradict each other" in refused("--stages", "2", "--cut", "up.0", "--cut", "up.1")
    assert len(told("--cut", "up.0", *QUICK)["stages"]) == 2


def test_options_that_are_missing_or_out_of_range() -> None:
    assert "--devices" in plait("one.json", "--global-batch", "8").stderr
    assert "--global-batch" in plait("one.json", "--devices", "8").stderr
    assert "--devices" in refused(devices="0") and "--global-batch" in refused(batch="-4")
    assert "--least-bubble" in refused("--least-bubble", "-1") and "--replicas" in refused("--replicas", "some")
    assert "--schedule" in refused("--schedule", "2f2b")


def test_files_that_cannot_be_written() -> None:
    assert "must end in .svg or .html" in refused("--timeline", "plan.png")
    for option, name in (("--timeline", "gone/a.svg"), ("--trace", "gone/a.json"), ("-o", "gone/a.json")):
        assert "nothing can be written there" in refused(option, name)
    assert "nothing can be written there" in refused("--profile", "gone/new.json", src="a.b:c")


def test_a_profile_that_is_missing_or_damaged() -> None:
    assert "P1402" in refused(src="gone.json") and "No such file" in refused(src="gone.json")
    Path("cut.json").write_text(Path("one.json").read_text()[:200])
    assert "P1402" in refused(src="cut.json") and "is no JSON" in refused(src="cut.json")
    assert "P1402" in refused("--profile", "cut.json", src="a.b:c")
    Path("bytes.json").write_bytes(b"\xff\xfe\x00")
    assert "is no JSON" in refused(src="bytes.json")


GOOD = {"name": "a", "forward": [[1, 0.1]], "backward": [[1, 0.2]]}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ([], "TypeError"),
        ({"version": 2}, "version 2"),
        ({"chains": []}, "one or two chains"),
        ({"chains": [[]]}, "one or two chains"),
        ({"chains": [[GOOD], [GOOD], [GOOD]]}, "one or two chains"),
        ({"chains": 7}, "TypeError"),
        ({"chains": [[{"name": "a", "forward": [[1, 0.1]]}]]}, "layer 'a' has no backward"),
        ({"chains": [[{}]]}, "has no name and no forward and no backward"),
        ({"chains": [[GOOD | {"forwards": 1}]]}, "a layer has 'forwards'"),
        ({"chains": [[GOOD | {"forward": 0.1}]]}, "TypeError"),
        ({"chains": [[GOOD | {"forward": []}]]}, "curve without points"),
        ({"chains": [[GOOD | {"forward": [[1, -0.1]]}]]}, "negative or no number"),
        ({"chains": [[GOOD | {"forward": [[-1, 0.1]]}]]}, "negative or no number"),
        ({"chains": [[GOOD | {"saved": [[1, 2]]}]]}, "TypeError"),
        ({"chains": [[GOOD | {"saved": float("nan")}]]}, "negative or no number"),
        ({"frozen": [{"name": "f", "seconds": [[1, 1]], "after": [0]}]}, "reads what comes behind it"),
        ({"links": {"send_rate": 0}}, "rate that is not positive"),
        ({"links": {"sum_latency": -1}}, "negative or no number"),
        ({"links": {"bandwidth": 1}}, "bandwidth"),
        ({"condition": 2}, "condition is no probability"),
        ({"optimizer": -1}, "negative or no number"),
    ],
)
def test_profiles_that_make_no_sense(change: Any, why: str) -> None:
    good = {"version": 1, "chains": [[GOOD]]}
    assert Profile.from_json(good).chains[0][0].name == "a"
    with pytest.raises(BadProfile, match=re.escape(why)):
        Profile.from_json(good | change if isinstance(change, dict) else change)
    with pytest.raises(BadProfile, match="it has no 'chains'"):
        Profile.from_json({"version": 1})


def test_what_does_not_divide() -> None:
    found = refused("--microbatches", "5")
    assert "P1403" in found and "goes into 4 devices and a batch of 32" in found
    assert "P1403" in refused("--groups", "3")


def test_too_many_stages() -> None:
    assert "cut into 5 stages on 4 devices" in refused("--stages", "5")
    assert "there are 5 places where it may be cut" in refused("--stages", "8", devices="8")


def test_layers_that_cannot_be_cut_at() -> None:
    found = refused("--cut", "sideways.0")
    assert "P1404" in found and f"name one of these: {', '.join(NAMES[1:])}" in found
    assert "the first stage begins with" in refused("--cut", "down.0")
    assert "2 and 3 stages" in refused("--cut", "up.0", "--cut", "fine.1", "--cut", "fine.2", src="two.json")


def test_schedules_for_another_number_of_backbones() -> None:
    assert "no schedule for one backbone" in refused("--schedule", "bidirectional")
    assert "no schedule for two backbones" in refused("--schedule", "1f1b", src="two.json")


def test_measured_layers_are_named_by_their_modules() -> None:
    names = ("0: down.0", "1: down.1.norm", "2: down.1", "3: model.py:7", "4: up.10", "5: up.1")
    found = Profile((tuple(Layer(name, curve(1), curve(2)) for name in names),))
    for name, at in {
        "down.1": 1,
        "2: down.1": 2,
        "1: down.1.norm": 1,
        "down.1.norm": 1,
        "model.py:7": 3,
        "up": 4,
        "up.1": 5,
    }.items():
        assert cuts_of(found, [name]) == ((at,),), name
    with pytest.raises(CannotStage, match=r"no trained layer 'up\.1\.norm'"):
        cuts_of(found, ["up.1.norm"])
    twice = Profile((chain("a", 1, 1), chain("a", 1, 1)))
    with pytest.raises(CannotStage, match=r"2 layers are called 'a\.1'"):
        cuts_of(twice, ["a.1"])
    assert schedules_of(found, ["gpipe", "1f1b", "gpipe"]) == ("gpipe", "1f1b")


# -- documentation ------------------------------------------------------------------------------------------------------


def test_the_page_shows_what_the_command_prints() -> None:
    page = (DOCS / "stages.md").read_text()
    module = types.ModuleType("example")
    exec(re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)[0], vars(module))
    shown = re.search(r"^```text\n\$ plait (plan .*?)\n\n(.*?)^```$", page, re.M | re.S)
    assert shown is not None
    result = CliRunner().invoke(main, shown[1].replace("\\\n", " ").split(), catch_exceptions=False)
    assert result.stdout.rstrip() == shown[2].rstrip()


def test_every_field_of_a_profile_is_on_the_page() -> None:
    page = (DOCS / "stages.md").read_text()
    data = profile(condition=0.5).to_json()
    fields = {*data, *data["links"], *(n for layer in (*data["chains"][0], *data["frozen"]) for n in layer)}
    assert {name for name in fields if f"`{name}`" not in page} == set()


def test_a_summary_reads_what_was_written() -> None:
    found = plan(profile_from("one.json", None), 4, 32, stage_counts=(2,), groups=(1,), microbatch_counts=(4,))
    assert Summary(found).as_json()["plan"] == str(found)
