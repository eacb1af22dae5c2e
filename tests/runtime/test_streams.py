"""The order of work on device streams, with streams that only write down what they are told."""

import pytest
import torch
from plait.runtime.plan import Launch
from plait.runtime.streams import Streams

from tests.runtime.kit import call, make_plan, v, value


class FakeStream:
    def __init__(self, log, name):
        self.log, self.name, self.cuda_stream = log, name, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self):
        self.log.append(f"{self.name} records")
        return f"the event of {self.name}"


@pytest.fixture
def log(monkeypatch):
    log = []
    names = iter(("side1", "side2"))
    current = FakeStream(log, "main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log, next(names)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    return log


def test_order(log):
    values = [value(i, "fresh", (4,)) for i in range(3)]
    steps = [
        Launch("nothing", (0, 1), ()),
        Launch("nothing", (1, 2), (), stream=1, waits=(0,)),
        Launch("nothing", (0, 1), (), waits=(0,)),
        Launch("nothing", (0, 2), (), waits=(1,)),
        call("aten.neg.default", [v(2)], [None]),
    ]
    streams = Streams(make_plan([], values, steps, []), torch.device("cuda"))
    current = streams.begin(None)
    assert log == ["side1 waits for main"]
    events = {}
    used = []
    for number in range(len(steps)):
        log.append(f"step {number}")
        used.append(streams.before(number, current, events))
        streams.after(number, current, events)
    streams.finish(current)
    assert used == ["main", "side1", "main", "main", "main"]
    assert log[1:] == [
        "step 0",
        "main records",
        "step 1",
        "side1 waits for the event of main",
        "side1 records",
        "step 2",
        "step 3",
        "main waits for the event of side1",
        "step 4",
        "main waits for side1",
        "main waits for side1",
    ]


def test_a_frame_that_another_stream_used_is_waited_for(log):
    streams = Streams(make_plan([], [], [], []), torch.device("cuda"))
    current = streams.begin(None)
    streams.begin(current)
    assert log == []
    streams.begin(FakeStream(log, "earlier"))
    assert log == ["main waits for earlier"]
