"""Micro-batch schedules: those known by name are valid, files are those of torch, what cannot run is refused."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plait.cost.microbatches import (
    NAMED,
    Action,
    Format,
    Schedule,
    Times,
    bidirectional,
    gpipe,
    greedy,
    in_order,
    interleaved,
    one_f_one_b,
    self_conditioned,
    zero_bubble,
)  # fmt: skip
from plait.cost.stages import StageCost, run
from plait.errors import BadSchedule
from torch.distributed.pipelining import schedules as torch_schedules

SEED = 20261201
SHAPES = [(1, 1), (1, 3), (2, 1), (2, 4), (3, 2), (3, 6), (4, 4), (4, 8), (5, 5), (6, 12)]


def known(stages: int, microbatches: int) -> list[Schedule]:
    """All schedules that plait makes of so many stages (of a chain) and micro-batches."""
    made = [make(stages, microbatches) for name, make in NAMED.items() if name != "interleaved" or not microbatches % stages]
    if microbatches % stages == 0:
        made.append(interleaved(stages, microbatches, 3))
    made.append(zero_bubble(stages, microbatches, in_flight=2 * stages - 1))
    made.append(bidirectional(stages, microbatches))
    return made + [self_conditioned(one) for one in made]


def text(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, rank)) for rank in schedule.ranks]


def of_text(*ranks: str, stages: int | None = None) -> Schedule:
    """A schedule from actions with blanks between them, one line for each rank."""
    actions = tuple(tuple(Action.of(one) for one in rank.split()) for rank in ranks)
    last = max(part.stage for rank in actions for one in rank for part in (one.parts or (one,)))
    return Schedule("given", actions, (tuple(range(last + 1 if stages is None else stages)),))


def torch_actions(schedule: Schedule) -> dict[int, list[Any]]:
    return {r: [torch_schedules._Action.from_str(str(a)) for a in rank] for r, rank in enumerate(schedule.ranks)}


def torch_made(kind: Any, ranks: int, microbatches: int, chunks: int) -> Any:
    """A schedule object of torch, which looks at these attributes of stages only."""
    stages = [
        SimpleNamespace(group_size=ranks, group_rank=0, num_stages=ranks * chunks, stage_index=ranks * i, submod=None)
        for i in range(chunks)
    ]
    return kind(stages, microbatches)


# -- the known ones ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_known_schedules_are_valid_with_and_without_communication(shape: tuple[int, int]) -> None:
    for one in known(*shape):
        assert one.check() is one and one.microbatches == shape[1], one.name
        whole = one.with_comms().check()
        assert whole.with_comms() == whole
        for with_comms, without in zip(whole.ranks, one.ranks, strict=True):
            assert [a for a in with_comms if not a.kind.startswith(("SEND", "RECV"))] == list(without)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_received_in_the_order_in_which_they_are_sent_and_no_earlier_than_needed(shape: tuple[int, int]) -> None:
    for one in known(*shape):
        whole = one.with_comms()
        sent: dict[tuple[int, int], list[Action]] = {}
        got: dict[tuple[int, int], list[Action]] = {}
        for rank, actions in enumerate(whole.ranks):
            for i, action in enumerate(actions):
                way = {"F": 1, "B": -1}.get(action.kind[-1], 0)
                if action.kind.startswith("SEND"):
                    there = whole.beside(action.stage, way)
                    assert there is not None
                    received = Action(there, action.kind.replace("SEND", "RECV"), action.microbatch)
                    sent.setdefault((rank, whole.rank_of[there]), []).append(received)
                elif action.kind.startswith("RECV"):
                    here = whole.beside(action.stage, -way)
                    assert here is not None
                    got.setdefault((whole.rank_of[here], rank), []).append(action)
                    # behind receives comes what needs the last of them
                    behind = next(a for a in actions[i:] if not a.kind.startswith("RECV"))
                    assert behind.kind in "CFBI", (one.name, rank, behind)
        assert sent == got, one.name


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_interleaved_is_torchs_own_order(ranks: int, chunks: int) -> None:
    for rounds in (1, 2, 3):
        theirs = torch_made(torch_schedules.ScheduleInterleaved1F1B, ranks, ranks * rounds, chunks)
        ours = interleaved(ranks, ranks * rounds, chunks)
        for rank, actions in enumerate(ours.ranks):
            wanted = [a for a in theirs._calculate_single_rank_operations(rank) if a is not None]
            assert list(map(str, actions)) == list(map(str, wanted))


def test_one_f_one_b_and_gpipe_by_hand() -> None:
    assert text(one_f_one_b(2, 3)) == ["0F0 0F1 0B0 0F2 0B1 0B2", "1F0 1B0 1F1 1B1 1F2 1B2"]
    assert text(gpipe(2, 2)) == ["0F0 0F1 0B0 0B1", "1F0 1F1 1B0 1B1"]
    assert text(self_conditioned(one_f_one_b(1, 2))) == ["0C0 0C1 0F0 0B0 0F1 0B1"]
    assert text(one_f_one_b(2, 1).with_comms()) == ["0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_more_is_in_flight_than_1f1b_allows(shape: tuple[int, int]) -> None:
    stages, count = shape
    for one, back in ((one_f_one_b(*shape), "B"), (zero_bubble(*shape), "I")):
        for s, actions in enumerate(one.ranks):
            flying = weights = 0
            for a in actions:
                flying += (a.kind == "F") - (a.kind == back)
                weights += (a.kind == "F") - (a.kind == "W")
                assert flying <= min(stages - s, count)
                assert back == "B" or weights <= stages


@pytest.mark.parametrize(("stages", "limits"), [(2, range(1, 6)), (3, range(1, 9)), (4, range(1, 9)), (6, (5, 6, 7, 8, 11))])
def test_more_in_flight_never_makes_zero_bubble_slower(stages: int, limits: range) -> None:
    costs = [StageCost(1, 2, 1)] * stages
    for count in (stages, 2 * stages + 1):
        seconds = [run(zero_bubble(stages, count, in_flight=n).check(), costs).seconds for n in limits]
        assert seconds == sorted(seconds, reverse=True), (count, seconds)


def drawn_times(rng: random.Random) -> Times:
    return Times(rng.choice([1, 5]) * rng.random() + 0.1, rng.random() + 0.1, rng.random() + 0.1, rng.choice([0, 0, 0.3]))


def test_schedules_for_any_times_are_valid_and_zero_bubble_is_no_slower_than_1f1b() -> None:
    for turn in range(25):
        rng = random.Random(SEED + turn)
        print(f"seed {SEED + turn}")
        stages, count = rng.randint(1, 5), rng.randint(1, 9)
        one, two = [drawn_times(rng) for _ in range(stages)], [drawn_times(rng) for _ in range(2 * stages)]
        split, both = zero_bubble(stages, count, one).check(), bidirectional(stages, count, two).check()
        for made in (split, both):
            made.with_comms().check()
            self_conditioned(made).check().with_comms().check()
        costs = [StageCost(t.forward, t.backward_input + t.backward_weight, t.backward_weight, t.send, t.send) for t in one]
        slow, fast = run(one_f_one_b(stages, count), costs), run(split, costs)
        assert fast.seconds <= slow.seconds * (1 + 1e-9)


def test_limits_that_stop_a_schedule_are_an_error() -> None:
    with pytest.raises(BadSchedule, match="never ends"):
        greedy("stuck", ((0, 1),), {0: 0, 1: 1}, 2, (), [(2, 2), (0, 0)], split=False)


# -- files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["compute_only", "compute_comms"])
@pytest.mark.parametrize("shape", SHAPES[1::3], ids=str)
def test_files_are_read_as_they_were_written_and_by_torch_too(
    shape: tuple[int, int], format: Format, tmp_path: Path
) -> None:
    path = tmp_path / "one.csv"
    for one in known(*shape):
        if len(one.chains) > 1 or one.self_conditioned:  # torch knows neither
            with pytest.raises(BadSchedule, match="files hold one chain of stages, without self-conditioning"):
                one.write(path, format)
            continue
        one.write(path, format)
        again = Schedule.read(path, format)
        assert again.ranks == (one if format == "compute_only" else one.with_comms()).ranks
        assert again.chains == one.chains and again.name == "one"
        with path.open() as file:
            cells = [[torch_schedules._Action.from_str(cell) for cell in line.strip().split(",")] for line in file]
        assert [list(map(str, row)) for row in cells] == [list(map(str, rank)) for rank in again.ranks]
        found = torch_schedules._validate_schedule(
            dict(enumerate(cells)), len(one.ranks), len(one.rank_of), one.microbatches
        )
        assert found == one.rank_of


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_adds_communication_to_ours_and_runs_what_we_added(shape: tuple[int, int]) -> None:
    for one in known(*shape):
        if len(one.chains) > 1 or one.self_conditioned:
            continue
        count = len(one.rank_of)
        lowered = torch_schedules._add_send_recv(torch_actions(one), one.rank_of.__getitem__, count)
        torch_schedules._simulate_comms_compute(lowered, one.rank_of.__getitem__, count)
        torch_schedules._simulate_comms_compute(torch_actions(one.with_comms()), one.rank_of.__getitem__, count)
        theirs = of_text(*(" ".join(map(str, actions)) for actions in lowered.values()), stages=count).check()
        assert sum(map(len, theirs.ranks)) == sum(map(len, one.with_comms().ranks))


@pytest.mark.parametrize(
    ("kind", "ranks", "microbatches", "chunks"),
    [
        ("LoopedBFS", 2, 4, 2), ("Interleaved1F1B", 3, 6, 2), ("InterleavedZeroBubble", 4, 8, 1),
        ("InterleavedZeroBubble", 2, 6, 2), ("ZBVZeroBubble", 3, 8, 2), ("DualPipeV", 2, 6, 2), ("DualPipeV", 4, 8, 2),
    ],
)  # fmt: skip
def test_files_of_torch_are_read(kind: str, ranks: int, microbatches: int, chunks: int, tmp_path: Path) -> None:
    theirs = torch_made(torch_schedules.get_schedule_class(kind), ranks, microbatches, chunks)
    theirs._dump_csv(tmp_path / "only.csv", "compute_only")
    theirs._dump_csv(tmp_path / "comms.csv", "compute_comms")
    only, whole = Schedule.read(tmp_path / "only.csv"), Schedule.read(tmp_path / "comms.csv", "compute_comms")
    empty = any(not cell for line in (tmp_path / "only.csv").read_text().splitlines() for cell in line.split(","))
    assert empty == (kind != "DualPipeV")
    assert only.microbatches == whole.microbatches == microbatches and len(only.rank_of) == ranks * chunks
    assert whole.has_comms and not only.has_comms and whole.has_sends
    assert only.rank_of == whole.rank_of
    kinds = {a.kind for rank in whole.ranks for a in rank}
    assert {"UNSHARD", "RESHARD", "REDUCE_GRAD", "SEND_F", "RECV_B"} <= kinds
    assert ("OVERLAP_F_B" in kinds) == (kind == "DualPipeV")
    # both say the same, and take the same time on paper
    costs = [StageCost(1.0, 2.0, 1.0, 0.25, 0.25)] * len(only.rank_of)
    assert run(only, costs).seconds == pytest.approx(run(whole, costs).seconds)
    only.with_comms().check()
    whole.write(tmp_path / "again.csv")
    assert Schedule.read(tmp_path / "again.csv").ranks == only.ranks


def test_a_file_that_gathers_parameters_only_still_gets_sends(tmp_path: Path) -> None:
    one = of_text("0UNSHARD 0F0 0B0 0RESHARD", "1UNSHARD 1F0 1B0 1RESHARD")
    assert text(one.with_comms())[1] == "1UNSHARD 1RECV_F0 1F0 1B0 1SEND_B0 1RESHARD"
    one.write(tmp_path / "one.csv", "compute_comms")
    assert Schedule.read(tmp_path / "one.csv", "compute_comms").has_sends


def test_pairs_are_done_one_part_after_the_other() -> None:
    pair = Action.of(" (2F1;0B0)OVERLAP_F_B ")
    assert str(pair) == "(2F1;0B0)OVERLAP_F_B" and [str(part) for part in pair.parts] == ["2F1", "0B0"]
    with pytest.raises(BadSchedule, match="stage 1 is on rank 0 and on rank 1"):
        of_text("0F0 0F1 (0B0;1F1)OVERLAP_F_B 0B1", "1F0 1B0 1B1").check()
    with pytest.raises(BadSchedule, match="never ends"):  # parts start together
        of_text("0F0 (1F0;1B0)OVERLAP_F_B 0B0").check()
    both = of_text("0F0 1F0 1B0 (0B0;0F1)OVERLAP_F_B 1F1 1B1 0B1").check()
    assert both.microbatches == 2 and run(both, [StageCost(1, 2)] * 2).seconds == 12


def test_empty_lines_and_fields_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("0F0,,0F1, ,0B0,0B1\n\n ,1F0,1B0,1F1,1B1,\n\n")
    assert text(Schedule.read(tmp_path / "a.csv")) == ["0F0 0F1 0B0 0B1", "1F0 1B0 1F1 1B1"]


# -- what is refused -------------------------------------------------------------------------------------------------------

WRONG = {
    "0X0": r"'0X0' is no action",
    "0F": r"'0F' is no action",
    "F0": r"'F0' is no action",
    "0SEND_F": r"'0SEND_F' is no action",
    "()OVERLAP_F_B": r"is no action",
    "(0F0;0Z0)OVERLAP_F_B": r"'0Z0' is no action",
    "": "it has no micro-batch",
    " ,": "it has no micro-batch",
    "0F0,0B0,0F0": "0F0 happens twice",
    "0F0,0B0,1F1\n1F0,1B0": "stage 1 is on rank 0 and on rank 1",
    "0F0,0B0\n2F0,2B0": r"stages \[1\] are on no rank",
    "0F0": "stage 0 does F for micro-batch 0; it needs F and B, or F, I and W",
    "0F0,0I0": "stage 0 does F, I for micro-batch 0",
    "0F0,0B0,0W0": "stage 0 does B, F, W for micro-batch 0",
    "0F1,0B1": "stage 0 does nothing for micro-batch 0",
    "0B0,0F0": "never ends: 0B0 wait",
    "0F0,0W0,0I0": "never ends: 0W0 wait",
    "0F0,0B0\n1B0,1F0": "never ends: 0B0, 1B0 wait",
    "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1": "never ends: 0B0, 1F1 wait",
}


@pytest.mark.parametrize("file", WRONG, ids=str)
def test_files_that_are_no_schedule_are_refused(file: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(file)
    with pytest.raises(BadSchedule, match=WRONG[file]):
        Schedule.read(tmp_path / "a.csv")


FIRST, LAST = "0F0 0SEND_F0 0RECV_B0 0B0", "1RECV_F0 1F0 1B0 1SEND_B0"
WRONG_LINKS = {
    "a value is never received": (FIRST, "1F0 1B0 1SEND_B0", "rank 1 does not receive what rank 0 sends"),
    "a value is never sent": ("0F0 0RECV_B0 0B0", LAST, "rank 1 does not receive what rank 0 sends"),
    "it is received in another order": (
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1",
        "1RECV_F1 1RECV_F0 1F0 1F1 1B0 1SEND_B0 1B1 1SEND_B1",
        "rank 1 does not receive what rank 0 sends, in the order in which it is sent",
    ),
    "it is used before it is received": (FIRST, "1F0 1RECV_F0 1B0 1SEND_B0", "never ends: 0RECV_B0, 1F0 wait"),
    "it is sent before it is there": ("0SEND_F0 0F0 0RECV_B0 0B0", LAST, "never ends: 0SEND_F0, 1RECV_F0 wait"),
    "a gradient is used before it is received": ("0F0 0SEND_F0 0B0 0RECV_B0", LAST, "never ends: 0B0 wait"),
    "nobody is at the other end": (f"{FIRST} 0SEND_B0", LAST, "0SEND_B0 has no stage at its other end"),
}


@pytest.mark.parametrize("case", WRONG_LINKS)
def test_what_travels_is_checked(case: str, tmp_path: Path) -> None:
    *ranks, why = WRONG_LINKS[case]
    (tmp_path / "a.csv").write_text("\n".join(rank.replace(" ", ",") for rank in ranks))
    with pytest.raises(BadSchedule, match=why):
        Schedule.read(tmp_path / "a.csv", "compute_comms")


def test_communication_has_no_place_in_compute_only(tmp_path: Path) -> None:
    one_f_one_b(2, 2).write(tmp_path / "a.csv", "compute_comms")
    with pytest.raises(BadSchedule, match="the format compute_only has no place for"):
        Schedule.read(tmp_path / "a.csv")
    (tmp_path / "b.csv").write_text("0UNSHARD,0F0,0B0")
    with pytest.raises(BadSchedule, match="the format compute_only has no place for"):
        Schedule.read(tmp_path / "b.csv")


def test_more_stages_than_occur_and_other_files_are_refused(tmp_path: Path) -> None:
    one_f_one_b(2, 2).write(tmp_path / "a.csv")
    with pytest.raises(BadSchedule, match=r"stages \[2\] are on no rank"):
        Schedule.read(tmp_path / "a.csv", stages=3)
    (tmp_path / "b.csv").write_bytes(bytes(range(256)))
    with pytest.raises(BadSchedule, match=r"b\.csv is no CSV file"):
        Schedule.read(tmp_path / "b.csv")
    with pytest.raises(FileNotFoundError):
        Schedule.read(tmp_path / "none.csv")


def test_micro_batches_go_in_rounds() -> None:
    with pytest.raises(BadSchedule, match="6 micro-batches do not go in rounds of 4"):
        interleaved(4, 6)
    with pytest.raises(BadSchedule, match="stage 5 is in no chain"):
        gpipe(2, 2).beside(5, 1)


def test_what_cannot_run_has_no_self_conditioning_either() -> None:
    with pytest.raises(BadSchedule, match="never ends"):
        self_conditioned(of_text("0F0 0B0", "1B0 1F0"))


def test_an_order_has_every_action_behind_what_it_needs() -> None:
    one = interleaved(3, 6)
    at = {(a.stage, a.kind, a.microbatch): i for i, (_, a) in enumerate(in_order(one))}
    assert len(at) == sum(map(len, one.ranks))
    for (stage, kind, m), i in at.items():
        before = {"F": (stage - 1, "F", m), "B": (stage + 1, "B", m)}[kind]
        assert at.get(before, -1) < i and (kind == "F" or at[stage, "F", m] < i)
