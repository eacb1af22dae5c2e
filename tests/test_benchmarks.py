"""The benchmarks' own machinery: timing, stored results, shards that lose their process, choice of samples."""

from __future__ import annotations

import json
import queue
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__, beside, harness, op_db, overhead, plait_seam, runner, soak, speeds
from benchmarks.overlap import exact as exactness
from benchmarks.overlap import exact_rank, faults, jobs, steps
from benchmarks.runner import Letter, Outcome, Run, Suite

# a worker that obeys the protocol of op_db_worker: sample 1 of every op kills it, sample 2 of `slow` hangs
FAKE_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    task = json.loads(line)
    say = lambda m: print(json.dumps(m), flush=True)
    say({"plan": [0, 1, 2, 3]})
    for i in range(4):
        if i in task["skip"]:
            continue
        say({"start": i})
        if i == 1:
            os.kill(os.getpid(), 11)
        if i == 2 and task["op"] == "slow":
            time.sleep(60)
        say({"record": {"op": task["op"], "sample": i, "class": "generated"}})
    say({"done": task["op"]})
"""


class TestHarness:
    def test_the_faster_candidate_is_faster(self) -> None:
        timings = harness.side_by_side(
            {"short": lambda: time.sleep(0.002), "long": lambda: time.sleep(0.04)}, rounds=3, seconds=2.0
        )
        assert timings.rounds >= 1
        assert timings.speedup("short", "long").median > 1.5
        assert set(timings.as_json("long")["speedup_over_long"]) == {"short"}

    def test_disturbed_rounds_are_thrown_away_and_counted(self) -> None:
        class Loud(harness.Probe):
            def __init__(self) -> None:
                self.calls = 0

            def quiet(self) -> bool:
                self.calls += 1
                return self.calls > 4  # the first two rounds are disturbed

        timings = harness.side_by_side({"a": lambda: None}, rounds=6, seconds=30.0, probe=Loud())
        assert (timings.rounds, timings.thrown, timings.trusted) == (6, 2, True)

    def test_a_machine_that_is_never_quiet_gives_figures_that_are_not_trusted(self) -> None:
        class Never(harness.Probe):
            def __init__(self) -> None: ...

            def quiet(self) -> bool:
                return False

        timings = harness.side_by_side({"a": lambda: None}, rounds=6, seconds=0.05, probe=Never())
        assert timings.rounds >= 1 and not timings.trusted

    def test_a_probe_that_runs_long_is_not_quiet(self) -> None:
        probe = harness.Probe()
        probe.calibrated_ms = 1e9
        assert probe.quiet()
        probe.calibrated_ms = 0.0
        assert not probe.quiet()


def letters(figure: int) -> Suite:
    return Suite(
        "made-up",
        "for this test",
        (
            Letter("a", "a number", "at most 3", lambda run: Outcome(figure, figure <= 3, ["row"]), sample="one row"),
            Letter("b", "costly", "none", lambda run: Outcome(0, True), optional=True),
        ),
    )


class TestRunner:
    @pytest.fixture(autouse=True)
    def results(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "RESULTS", tmp_path)

    def test_a_full_run_is_stored_and_a_quick_one_shows_it_beside_its_sample(self) -> None:
        full = runner.run_suite(letters(2), Run())
        assert full["summary"]["a"]["when"] == "now" and full["summary"]["b"]["when"] == "never measured"
        runner.store(full)
        quick = runner.run_suite(letters(4), Run(quick=True))["summary"]["a"]
        assert quick["figure"] == 2 and quick["when"].startswith("stored@")
        assert quick["sample"]["figure"] == 4 and not quick["holds"]
        assert "FAILS" in runner.table(runner.run_suite(letters(4), Run()))

    def test_a_quick_run_is_never_stored(self) -> None:
        with pytest.raises(SystemExit, match="never stored"):
            runner.store(runner.run_suite(letters(2), Run(quick=True)))

    def test_storing_one_letter_keeps_the_others(self) -> None:
        runner.store(runner.run_suite(letters(2), Run(), "b"))
        runner.store(runner.run_suite(letters(3), Run(), "a"))
        assert {k: v["figure"] for k, v in runner.stored("made-up").items()} == {"a": 3, "b": 0}

    def test_without_time_left_a_quick_run_measures_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runner, "QUICK_SECONDS", 1.0)
        assert runner.run_suite(letters(2), Run(quick=True))["summary"]["a"]["when"] == "never measured"


class TestCommandLine:
    def test_list_names_every_letter(self, capsys: pytest.CaptureFixture) -> None:
        assert __main__.main(["--list"]) == 0
        printed = capsys.readouterr().out
        assert (
            printed.startswith("autobatch: ") and "\nspine: " in printed and all(f"\n  {k}  " in printed for k in "abcdefg")
        )

    def test_an_unknown_suite_is_refused_by_name(self, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit):
            __main__.main(["spin"])
        assert (
            "no suite is called 'spin'; there are: autobatch, debug, overlap, quantize, speed, spine"
            in capsys.readouterr().err
        )


class TestOpDatabase:
    def test_a_lost_process_is_replaced_and_its_sample_raises(self, tmp_path: Path) -> None:
        script = tmp_path / "worker.py"
        script.write_text(FAKE_WORKER)
        tasks: queue.Queue[str] = queue.Queue()
        for op in ("quick", "slow"):
            tasks.put(op)
        shard = op_db.Shard(tmp_path / "out.0", "plait", False, [sys.executable, str(script)], seconds=2.0)
        shard.drain(tasks, {"quick": {0}}, time.monotonic() + 60)
        found = {(r["op"], r["sample"]): (r["class"], r.get("reason")) for r in shard.records}
        assert found == {
            ("quick", 1): ("raises", "killed by SIGSEGV"),
            ("quick", 2): ("generated", None),
            ("quick", 3): ("generated", None),
            ("slow", 0): ("generated", None),
            ("slow", 1): ("raises", "killed by SIGSEGV"),
            ("slow", 2): ("raises", "no answer within 2 s"),
            ("slow", 3): ("generated", None),
        }
        assert [json.loads(line) for line in (tmp_path / "out.0").read_text().splitlines()] == shard.records

    def test_records_of_another_run_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "out.0").write_text('{"settings": {"backend": "x"}}\n{"op": "a", "sam')
        assert op_db.load(tmp_path / "out", {"backend": "x"}) == []
        with pytest.raises(SystemExit, match="another run"):
            op_db.load(tmp_path / "out", {"backend": "y"})

    def test_an_op_is_as_good_as_its_worst_sample(self) -> None:
        kinds = ["generated", "fallback", "generated", "silently wrong"]
        found = op_db.summary(
            {"op": "ab"[i // 2], "sample": i, "class": k, "reason": f"at {i}"} for i, k in enumerate(kinds)
        )
        assert found["by op"] == {"fallback": 1, "silently wrong": 1}
        assert found["by sample"] == {"generated": 2, "fallback": 1, "silently wrong": 1}
        assert "| silently wrong | 1 | 1 |" in op_db.table(found)

    def test_the_figures_are_shares_of_ops(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kinds = {"a": "generated", "b": "fallback", "c": "silently wrong", "d": "not differentiable", "e": "library"}
        kinds["f"] = "eager raises"
        found = op_db.summary({"op": op, "sample": 0, "class": kind} for op, kind in kinds.items())
        monkeypatch.setattr(op_db, "LOWERED", tmp_path / "lowered.json")
        op_db.LOWERED.write_text(json.dumps({"without fallback": ["a", "b", "e", "unknown"]}))
        assert op_db.figures(found, "forward") == {
            "forward: ops right": "3 of 4 (75.0%)",
            "without fallback, of the ops that Inductor lowers without one": "2 of 3 (66.7%)",
            "silently wrong": "1",
        }
        assert "without fallback" not in " ".join(op_db.figures(found, "backward"))

    @pytest.mark.slow
    def test_gradients_through_a_real_process(self, tmp_path: Path) -> None:
        options = {"mode": "backward", "ops": "^(abs|argmax)$", "shards": 1}
        records = op_db.run("aot_eager", **options, stem=tmp_path / "out")
        assert {(r["op"], r["class"]) for r in records} == {("abs", "ran"), ("argmax", "not differentiable")}

    @pytest.mark.slow
    def test_inductor_is_asked_without_compiling(self, tmp_path: Path) -> None:
        records = op_db.run("inductor", mode="lowering", ops="^(abs|linalg\\.svd)$", shards=1, stem=tmp_path / "out")
        assert {(r["op"], r["class"]) for r in records} == {("abs", "generated"), ("linalg.svd", "fallback")}

    @pytest.mark.slow
    def test_one_op_through_a_real_process(self, tmp_path: Path) -> None:
        records = op_db.run("aot_eager", ops="^empty_permuted$", shards=1, stem=tmp_path / "out")
        assert {r["class"] for r in records} == {"ran"} and all("values" in r for r in records)
        again = op_db.run("aot_eager", ops="^empty_permuted$", shards=1, stem=tmp_path / "out", resume=True)
        assert again == records


def test_peers_are_observed_by_counting() -> None:
    plait_seam.fresh()
    with plait_seam.observe("eager") as seen:
        compiled = torch.compile(lambda x: x + 1, backend=seen.backend)
        compiled(torch.ones(2)), compiled(torch.ones(2))
    assert seen.runs == 2 and plait_seam.coverage(seen.graphs)["graphs"] == 1


class TestSpeeds:
    def test_the_interval_of_a_median_begins_below_it(self) -> None:
        pairs = tuple(float(i) for i in range(1, 26))
        timings = harness.Timings({"ours": (1.0,) * 25, "theirs": pairs}, 25, 0, True)
        assert timings.speedup("ours", "theirs").median == 13.0
        assert timings.at_least("ours", "theirs") == 8.0
        assert harness.Timings({"ours": (2.0,), "theirs": (1.0,)}, 1, 0, True).at_least("ours", "theirs") == 0.5

    def test_every_row_belongs_to_a_goal_and_has_a_name_of_its_own(self) -> None:
        rows = list(speeds.rows_of_models())
        titles = [variant.title(name) for _, name, variant in rows]
        assert len(set(titles)) == len(titles) and {g for g, _, _ in rows} | {"micro-benchmarks"} == set(speeds.GOALS)
        assert "bert forward of 8" in titles and "bert forward frozen" in titles and "t5 forward bfloat16" in titles

    def test_a_row_that_may_be_slower_is_named(self) -> None:
        row = {
            "speedup_over_inductor": [3.0, 2.9, 3.1],
            "verdict": {"plait": "equal"},
            "at least": {"eager": 1.5, "inductor": 0.9},
        }
        found = speeds._outcome({"micro-benchmarks": {"a": row}}, {}, Run())
        assert found is not None and not found.holds
        assert found.figure["micro-benchmarks over Inductor"] == "3.00x of 1"
        assert found.figure["not shown to be as fast as eager and Inductor"] == "a"

    @pytest.mark.parametrize(("share", "holds"), [(0.8, True), (0.7, False)])
    def test_large_transformers_must_come_near_the_ceiling(self, share: float, holds: bool) -> None:
        row = {"speedup_over_inductor": [3.0] * 3, "verdict": {"plait": "equal"}, "at least": {"eager": 1.5}}
        rows = {f"{n} forward of 8": {**row, "share of the ceiling": s} for n, s in (("bert", share), ("t5", 0.9))}
        found = speeds._outcome({"transformers": rows}, {}, Run())
        assert found is not None and found.holds == holds
        wanted = f"{share:.0%} (bert forward of 8) or more"
        assert found.figure["transformers of 8, share of the multiply-add ceiling"] == wanted

    def test_peers_that_are_faster_or_missing_are_named(self) -> None:
        rows = {
            "bert": {
                "verdict": {"plait": "equal"},
                "time": {"trusted": True},
                "speedup": {"openvino": 2.0, "onnxruntime": 1.5},
            },
            "vit": {
                "verdict": {"plait": "equal"},
                "time": {"trusted": False},
                "speedup": {"openvino": 0.5, "onnxruntime": 1.5},
            },
            "llama": {"skipped": "no space left"},
        }
        row = {"speedup_over_inductor": [3.0] * 3, "verdict": {"plait": "equal"}, "at least": {"eager": 1.5}}
        found = speeds._outcome({"micro-benchmarks": {"a": row}}, rows, Run())
        assert found is not None and not found.holds and found.figure["wrong"] == 0
        assert found.figure["over openvino"] == "1.00x of 2" and found.figure["over onnxruntime"] == "1.50x of 2"
        assert found.figure["behind OpenVINO or ONNX Runtime"] == "vit (0.50x openvino)"
        assert found.figure["disturbed, hence not to be trusted"] == "vit"
        assert found.figure["not compared with OpenVINO and ONNX Runtime"] == "llama: no space left"
        rows = {"bert": rows["bert"]}
        assert speeds._outcome({"micro-benchmarks": {"a": row}}, rows, Run()).holds
        rows["bert"]["verdict"]["plait"] = "wrong"
        assert not speeds._outcome({"micro-benchmarks": {"a": row}}, rows, Run()).holds

    def test_without_an_environment_every_model_is_skipped_with_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails() -> Path:
            raise RuntimeError("pip found no openvino")

        monkeypatch.setattr(beside, "environment", fails)
        assert beside.measure(Run()) == {name: {"skipped": "pip found no openvino"} for name in beside.MODELS}

    def test_a_model_whose_process_fails_is_skipped_with_its_last_words(self, tmp_path: Path) -> None:
        python = tmp_path / "python"
        python.write_text("#!/bin/sh\necho bad >&2; exit 3")
        python.chmod(0o700)
        assert beside._row(python, "bert") == {"skipped": "bad"}
        python.write_text("#!/bin/sh\necho noise; echo '{\"a\": 1}'")
        assert beside._row(python, "bert") == {"a": 1}

    def test_candidates_may_settle(self) -> None:
        calls: list[str] = []
        timings = harness.side_by_side({"a": lambda: calls.append("a")}, rounds=2, seconds=5.0, settle=1e-4)
        assert timings.rounds == 2 and calls

    def test_shares_are_held_to_their_goals(self) -> None:
        assert op_db._reached("forward: ops right", "97 of 100 (97.0%)")
        assert not op_db._reached("forward: ops right", "96 of 100 (96.0%)")
        assert op_db._reached("backward, silently wrong", "0") and not op_db._reached("backward, silently wrong", "1")


class TestOverhead:
    def test_a_call_and_its_kernels_are_timed(self) -> None:
        case = overhead.CASES[-1]
        row = overhead.above_kernels(case, harness.Probe(), rounds=1, seconds=0.01)
        assert row["launches"] == 1 and row["call_us"] > 0 and row["kernels_us"] > 0

    def test_every_chain_has_as_many_launches_as_it_says(self) -> None:
        for count, case in zip(overhead.LAUNCHES[:2], overhead.chains(dynamic=True), strict=False):
            assert case.compiled().coverage.launches == count

    def test_costs_are_fitted_over_launches(self) -> None:
        rows = {str(n): {"launches": n, "above_us": 4.0 + 0.5 * n} for n in (1, 3, 10)}
        assert overhead.fit(rows, [*rows]) == pytest.approx((4.0, 0.5))


class TestSoak:
    def test_wrong_results_and_errors_are_counted(self) -> None:
        model = soak.Mixer().eval()

        def broken(x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] == soak.ROWS[0]:
                raise ValueError("no")
            return model(x) + (x.shape[0] == soak.ROWS[1])

        fine = soak.hammer(model, model, 40)
        assert fine["calls"] == 40 and fine["wrong"] == 0 and fine["threads"] == 0
        found = soak.hammer(broken, model, 400)
        assert found["wrong"] > 10 and {w.split(":")[0] for w in found["examples"]} <= {"2 rows", "3 rows"}

    @pytest.mark.slow
    def test_a_child_says_whether_it_is_right(self, tmp_path: Path) -> None:
        assert soak._complaints([soak.ended(soak.start(tmp_path / "c", ["second"]))]) == []
        assert soak._state(tmp_path / "c") == [] and soak.leftovers(tmp_path / "c") == []
        (tmp_path / "c" / "v3" / "tmp" / "x").mkdir()
        assert soak.leftovers(tmp_path / "c") == ["v3/tmp/x"]
        assert soak._complaints([soak.ended(soak.start(tmp_path / "c", ["third"]))])[0].endswith("KeyError: 'third'")


class TestOverlap:
    def test_the_best_of_no_overlap_and_tutels_degrees_is_the_baseline(self) -> None:
        seconds = {"i": 1.0, "ii/2": 0.8, "ii/4": 0.9, "iii": 0.7, "vi": 0.5}
        waited = {"i": 0.4, "ii/2": 0.2, "ii/4": 0.1, "iii": 0.1, "vi": 0.03}
        variants = {n: {"seconds": seconds[n], "waited": waited[n], "largest_loss_difference": 0.0} for n in seconds}
        found = {**steps.compared(variants), "variants": variants}
        assert found["baseline"] == "ii/2" and found["speedup"] == pytest.approx(1.6)
        assert found["share"] == pytest.approx(0.4) and found["removed"] == pytest.approx(0.85)
        assert found["speedups"]["iii"] == pytest.approx(1.4)
        assert all(steps.meets(share, found, quick=False) for share in steps.SHARES)
        assert "1.60x the best of (i), (ii), which is ii/2, 1.40x (iii)" in steps.said(found)
        assert not steps.meets(0.45, {**found, "removed": 0.7}, quick=False)
        assert not steps.meets(0.45, {**found, "speedup": 1.2}, quick=False)
        assert steps.meets(0.3, {**found, "speedup": 1.2}, quick=False)

    def test_every_difference_that_must_not_be_makes_exactness_fail(self) -> None:
        exact = {"exact": True, "routing": True, "forward": True, "loss": True, "differ": [], "error": 0.0}
        exact["as in float64"] = True
        floats = {**exact, "exact": False, "as in float64": False, "differ": ["grad x"], "error": 3.0, "loss": False}
        curves = [{"equal": 20, "steps": 50, "error": 2.0}]
        good = exactness.judged([exact, floats], curves, [True], None)
        assert good.holds and good.figure["gradients equal, floats"] == "0 of 1" and good.figure["losses equal"] == "1 of 2"
        for change in ({"routing": False}, {"forward": False}, {"differ": ["grad x"]}, {"as in float64": False}):
            assert not exactness.judged([{**exact, **change}, floats], curves, [True], None).holds, change
        assert not exactness.judged([exact, {**floats, "error": 4.1}], curves, [True], None).holds
        assert not exactness.judged([exact], [{**curves[0], "error": 4.1}], [True], None).holds
        assert not exactness.judged([exact], curves, [False], None).holds

    def test_an_error_must_come_in_time_and_everything_after_it_be_refused(self) -> None:
        fault = faults.Fault({0: ("P1101",)}, lambda ranks, link: None)
        line = {"at": 11.0, "code": "P1101", "then": "P1103"}
        assert faults._in_time(fault, [[{"at": 1.0, "loss": 0.5}, line], []], 10.0)
        for change in ({"code": "P1102"}, {"at": 30.0}, {"then": ""}):
            assert not faults._in_time(fault, [[{**line, **change}], []], 10.0), change
        assert not faults._in_time(fault, [[], [line]], 10.0)

    def test_results_of_a_job_are_kept_for_a_commit(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        ran: list[dict[str, str]] = []

        def ranks(command: list[str], where: Path, environment: dict[str, str]) -> list[object]:
            ran.append(json.loads(Path(command[-1]).read_text()))
            Path(ran[-1]["out"]).write_text(json.dumps(len(ran)))
            return []

        monkeypatch.setattr(jobs, "KEPT", tmp_path / "kept")
        monkeypatch.setattr(jobs, "commit", lambda: "abc")
        monkeypatch.setattr(jobs, "folder", lambda: tmp_path)
        monkeypatch.setattr(jobs, "start_on_loopback", ranks)
        assert [jobs.result("m", {"x": x}, None, 1.0, fresh=False) for x in (1, 1, 2)] == [1, 1, 2]
        assert jobs.result("m", {"x": 1}, None, 1.0, fresh=True) == 3
        monkeypatch.setattr(jobs, "commit", lambda: "abc+")
        assert jobs.result("m", {"x": 1}, None, 1.0, fresh=False) == 4
        (tmp_path / "out.json").unlink()
        (tmp_path / "rank0.log").write_text("why")
        monkeypatch.setattr(jobs, "start_on_loopback", lambda *_: [])
        with pytest.raises(SystemExit, match="why"):
            jobs.result("m", {"x": 3}, None, 1.0, fresh=False)

    def test_ranks_without_tokens_for_an_expert_draw_none(self) -> None:
        sizes = exact_rank.Sizes(12, 5, 16, 24, 4)
        for rank, experts in ((0, {0, 1, 3}), (1, {0})):
            x, target, draw, exact = exact_rank.batch(sizes, "empty", True, rank, 0)
            assert set((torch.rand(50, 4) + draw).argmax(1).tolist()) == experts
            assert torch.equal(x, x.round()) and torch.equal(target, target.round()) and exact == 1
