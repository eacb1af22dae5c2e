"""The profile table: choosing, keeping, merging; and the figures of the machine."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import replace

import pytest
import torch
from plait.codegen.templates import matmul_bench
from plait.codegen.templates.matmul_choice import (
    MKL,
    PACKED,
    TEMPLATE,
    MatmulProblem,
    candidate_names,
    choose_matmul,
    matmul_candidates,
)
from plait.cost import device
from plait.cost.profile import Choice, Key, Table, Timing, load, machine, measure_alternating, user_path
from plait.errors import DamagedProfile, ForeignProfile

KEY = Key("matmul", ("float32[64,384]", "float32[384,1536]"), 2)


def timing(seconds: float, n: int = 10, contended: bool = False) -> Timing:
    return Timing(n, seconds, seconds, seconds, seconds, 0, contended)


def measured(**seconds: float):
    """A measure function with a known result, that counts its calls."""

    def measure(candidates, threads, budget):
        measure.calls += 1
        return {name: timing(seconds[name], contended=measure.contended) for name in candidates}

    measure.calls, measure.contended = 0, False
    return measure


def runs(*names: str):
    return lambda: dict.fromkeys(names, lambda: None)


def test_chooses_the_fastest_and_remembers_it():
    table, measure = Table(), measured(a=2.0, b=1.0)
    assert table.choose(KEY, ["a", "b"], runs("a", "b"), measure) == Choice("b", timing(1.0), noisy=False)
    assert table.choose(KEY, ["a", "b"], runs("a", "b"), measure).name == "b"
    assert measure.calls == 1
    assert table.choose(replace(KEY, threads=1), ["a", "b"], runs("a", "b"), measure).name == "b"
    assert measure.calls == 2


def test_ties_go_to_the_first_named():
    assert Table().choose(KEY, ["b", "a"], runs("b", "a"), measured(a=1.0, b=1.0)).name == "b"


def test_a_new_candidate_is_measured_with_the_others():
    table, measure = Table(), measured(a=2.0, b=1.0, c=0.5)
    table.choose(KEY, ["a", "b"], runs("a", "b"), measure)
    assert table.choose(KEY, ["a", "b", "c"], runs("a", "b", "c"), measure).name == "c"
    assert table.choose(KEY, ["a", "b"], runs("a", "b"), measure).name == "b"
    assert measure.calls == 2


def test_a_noisy_answer_is_measured_once_more_and_replaced(tmp_path):
    path = tmp_path / "profile.json"
    noisy = measured(a=1.0, b=2.0)
    noisy.contended = True
    table = Table(path)
    assert table.choose(KEY, ["a", "b"], runs("a", "b"), noisy).noisy
    assert table.choose(KEY, ["a", "b"], runs("a", "b"), noisy).noisy
    assert noisy.calls == 1  # once per process
    table.save()
    calm, later = measured(a=3.0, b=2.0), Table(path)
    assert later.choose(KEY, ["a", "b"], runs("a", "b"), calm) == Choice("b", timing(2.0), noisy=False)
    assert calm.calls == 1


def test_record_keeps_the_better_timing():
    table = Table()
    table.record(KEY, "a", timing(1.0))
    table.record(KEY, "a", timing(9.0, contended=True))
    assert table.get(KEY)["a"] == timing(1.0)
    table.record(KEY, "a", timing(2.0, n=20))
    assert table.get(KEY)["a"].n == 20


def test_saves_and_loads_everything(tmp_path):
    table = Table(tmp_path / "deep" / "profile.json")
    table.record(KEY, "a", Timing(7, 1e-6, 1.1e-6, 1.25e-6, 2e-6, 3, False))
    table.record(replace(KEY, op="softmax"), "b", timing(1.0, contended=True))
    table.save()
    again = load(table.path)
    assert dict(again) == dict(table) and again.machine == machine()
    text = table.path.read_text()
    again.path = table.path
    again.save()
    assert table.path.read_text() == text


def test_saving_merges_with_what_others_saved(tmp_path):
    first, second = Table(tmp_path / "p.json"), Table(tmp_path / "p.json")
    first.record(KEY, "a", timing(1.0))
    second.record(KEY, "b", timing(2.0))
    first.save()
    second.save()
    assert set(load(tmp_path / "p.json").get(KEY)) == {"a", "b"}
    assert [f.name for f in tmp_path.iterdir() if f.suffix == ".tmp"] == []


def _save_many(path, worker):
    for i in range(5):
        table = Table(path)
        table.record(replace(KEY, op=f"{worker}.{i}"), "a", timing(1.0))
        table.save()


def test_processes_lose_nothing_of_each_other(tmp_path):
    path = tmp_path / "p.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_save_many, args=(path, w)) for w in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert len(load(path)) == 15


def test_refuses_timings_of_another_machine():
    other = Table(host={"cpu": "abacus", "isa": "beads", "torch": "0"})
    with pytest.raises(ForeignProfile, match="abacus"):
        Table().merge(other)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 99}', '{"version": 1, "machine": {}, "entries": [{"op": "x"}]}'], ids=repr
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(DamagedProfile, match=r"p\.json"):
        load(path)


def test_the_users_file_follows_the_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("PLAIT_CACHE_DIR", str(tmp_path))
    assert user_path().is_relative_to(tmp_path)


def test_measures_alternately_with_the_given_threads():
    seen, before = [], torch.get_num_threads()

    def slow():
        seen.append(("slow", torch.get_num_threads()))
        time.sleep(2e-3)

    def fast():
        seen.append(("fast", torch.get_num_threads()))

    result = measure_alternating({"slow": slow, "fast": fast}, 1, 0.03)
    assert torch.get_num_threads() == before
    assert result["slow"].minimum > 1e-3 > result["fast"].median
    assert seen[2:6] == [("slow", 1), ("fast", 1)] * 2
    assert result["slow"].n == result["fast"].n >= 3
    assert result["slow"].p10 <= result["slow"].median <= result["slow"].p90


def test_scattered_samples_count_as_contended():
    assert Timing.of([1.0, 1.0, 1.1, 5.0, 5.0]).contended
    assert not Timing.of([1.0, 1.0, 1.1, 1.2, 1.2]).contended


def test_figures_of_this_machine():
    host = device.cpu()
    assert host.cores >= 1 and host.l1_bytes < host.l2_bytes and host.memory_bytes > 1 << 28
    assert host == device.cpu()


# ---- matmul -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matmul")


@pytest.mark.parametrize(
    "problem", [MatmulProblem(9, 40, 33, owned=True), MatmulProblem(5, 6, 7, batch=3, b="n", dtype="float64")]
)
def test_matmul_candidates_all_run(folder, problem):
    calls = matmul_candidates(problem, 1, folder)
    assert tuple(calls) == candidate_names(problem)
    for call in calls.values():
        call()


def test_matmul_benchmark_checks_and_prints(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["matmul_bench", "--threads", "1", "--seconds", "0.01", "2x9x40x33", "1x4x32x64"])
    matmul_bench.main()
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3 and "template-packed" in rows[1] and "mkl" in rows[2]


def test_matmul_choice_is_kept_and_shared(folder, tmp_path):
    problem, path = MatmulProblem(16, 64, 32, owned=True), tmp_path / "p.json"
    table = Table(path)
    choice = choose_matmul(problem, table, 1, folder)
    assert choice.name in candidate_names(problem) and choice.timing.n >= 3
    table.save()
    stored = Table(path).get(problem.key(1))
    assert set(stored) == set(candidate_names(problem)) and {TEMPLATE, PACKED, MKL} <= set(stored)
    assert choose_matmul(replace(problem, owned=False), table, 1, folder).name != PACKED
    assert json.loads(path.read_text())["machine"] == machine()
