import weakref

import pytest
import torch
from plait.errors import (
    WrongInputCount,
    WrongInputDevice,
    WrongInputDtype,
    WrongInputRank,
    WrongInputShape,
    WrongInputStrides,
    WrongInputType,
    WrongInputValue,
)
from plait.runtime import inputs
from plait.runtime.executor import Executable
from plait.runtime.plan import InputSpec, SymbolSpec

from tests.runtime.kit import make_plan, tensor_input

PLAN = make_plan(
    [
        tensor_input("x", ("s0", 4)),
        tensor_input("y", (["mul", 2, "s0"],), strides=None),
        InputSpec("n", "int", expr="n"),
        InputSpec("three", "int", expr=3),
        InputSpec("scale", "float", expr=0.5),
        InputSpec("flag", "bool", expr=1),
        InputSpec("free", "float"),
        InputSpec("nothing", "none"),
    ],
    [],
    [],
    [],
    symbols=(SymbolSpec("s0", 0, 0, 2, 10), SymbolSpec("n", 2, None, 0, 7)),
)


@pytest.fixture
def run():
    return Executable(PLAN, {}, {})


def good(**changes):
    args = {
        "x": torch.zeros(3, 4),
        "y": torch.zeros(6),
        "n": 5,
        "three": 3,
        "scale": 0.5,
        "flag": True,
        "free": 1.25,
        "nothing": None,
    }
    return [*(args | changes).values()]


def test_right_inputs_pass_again_and_again(run):
    for _ in range(3):
        assert run(*good()) == []
    run(*good(x=torch.nn.Parameter(torch.zeros(10, 4)), y=torch.zeros(40)[::2], n=0, free=2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": 3}, WrongInputType, "input 'x' must be a tensor, got int"),
        ({"x": torch.zeros(3, 4).to_sparse()}, WrongInputType, "a dense tensor"),
        ({"x": torch.zeros(3, 4, dtype=torch.float64)}, WrongInputDtype, "input 'x' must be of dtype float32, got float64"),
        ({"x": torch.zeros(3, 4, device="meta")}, WrongInputDevice, "input 'x' must be on device cpu, got meta"),
        ({"x": torch.zeros(4)}, WrongInputRank, r"'x' must have 2 dimensions, got 1 \(shape \(4,\)\)[^)]*\(s0, 4\)"),
        ({"x": torch.zeros(3, 5)}, WrongInputShape, "dimension 1 of input 'x' must be 4, got 5"),
        ({"y": torch.zeros(7)}, WrongInputShape, r"dimension 0 of input 'y' must be 2\*s0 = 6, got 7"),
        ({"x": torch.zeros(4, 3).t()}, WrongInputStrides, "dimension 0 of input 'x' must have stride 4, got 1"),
        (
            {"x": torch.zeros(1, 4), "y": torch.zeros(2)},
            WrongInputValue,
            "dimension 0 of x' must be between 2 and 10, got 1",
        ),
        ({"x": torch.zeros(11, 4), "y": torch.zeros(22)}, WrongInputValue, "between 2 and 10, got 11"),
        ({"n": 8}, WrongInputValue, "'n' must be between 0 and 7, got 8"),
        ({"n": 2.0}, WrongInputType, "input 'n' must be a int, got float"),
        ({"n": True}, WrongInputType, "got bool"),
        ({"three": 4}, WrongInputValue, "'three' must be 3, got 4"),
        ({"scale": 0.25}, WrongInputValue, "'scale' must be 0.5, got 0.25"),
        ({"flag": False}, WrongInputValue, "'flag' must be 1, got False"),
        ({"nothing": []}, WrongInputType, "input 'nothing' must be None, got list"),
        ({"x": torch.zeros(3, 4, dtype=torch.complex64).conj().imag}, WrongInputType, "lazy"),
    ],
)
def test_wrong_inputs_are_named(run, changes, error, message):
    for _ in range(2):
        run(*good())
        with pytest.raises(error, match=message):
            run(*good(**changes))


def test_wrong_number_of_inputs(run):
    with pytest.raises(WrongInputCount, match=r"takes 8 inputs, got 1\n.*x, y, n, three"):
        run(torch.zeros(3, 4))
    with pytest.raises(WrongInputCount):
        Executable(PLAN, {}, {}, check=False)(torch.zeros(3, 4))


def test_subclasses_are_refused(run):
    class Odd(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise AssertionError

    with pytest.raises(WrongInputType, match="tensor subclass Odd"):
        run(*good(x=torch.Tensor._make_subclass(Odd, torch.zeros(3, 4))))


def test_strides_of_single_elements_do_not_matter():
    plan = make_plan([tensor_input("x", (1, 4))], [], [], [])
    Executable(plan, {}, {})(torch.zeros(4, 1).t())


class TestTensorsLikeThoseOfTheLastCall:
    """They pass by one native comparison; whatever differs in any way is looked at again."""

    plan = make_plan([tensor_input("x", ("s0", 4))], [], [], [], symbols=(SymbolSpec("s0", 0, 0, 2, 10),))

    def test_they_are_not_looked_at_again(self, monkeypatch):
        run = Executable(self.plan, {}, {})
        run(torch.zeros(3, 4))
        monkeypatch.setattr(inputs, "_signature", lambda x: pytest.fail("compared by signature"))
        run(torch.ones(3, 4))

    @pytest.mark.parametrize(
        ("wrong", "error"),
        [
            (torch.zeros(3, 5), WrongInputShape),
            (torch.zeros(11, 4), WrongInputValue),
            (torch.zeros(3), WrongInputRank),
            (torch.zeros(4, 3).t(), WrongInputStrides),
            (torch.zeros(3, 4).double(), WrongInputDtype),
            (torch.zeros(3, 4, device="meta"), WrongInputDevice),
            (torch.zeros(3, 4).to_sparse(), WrongInputType),
            (torch.zeros(3, 8, dtype=torch.complex64).conj().imag[:, :4], WrongInputType),
            ([torch.zeros(3, 4)], WrongInputType),
            (None, WrongInputType),
        ],
    )
    def test_others_are_refused_as_before(self, wrong, error):
        run = Executable(self.plan, {}, {})
        for _ in range(2):
            run(torch.zeros(3, 4))
            with pytest.raises(error):
                run(wrong)
        with pytest.raises(WrongInputCount):
            run(torch.zeros(3, 4), torch.zeros(3, 4))

    def test_what_matters_not_may_change(self):
        run = Executable(self.plan, {}, {})
        for x in (torch.zeros(3, 4), torch.zeros(3, 4, requires_grad=True), torch.nn.Parameter(torch.zeros(3, 4))) * 2:
            run(x)
            run(x.detach()[1:])
            with torch.inference_mode():
                run(x)
                run(torch.zeros(3, 4))

    def test_they_are_not_kept_alive(self):
        run, x = Executable(self.plan, {}, {}), torch.zeros(3, 4)
        run(x)
        gone = weakref.ref(x)
        del x
        assert gone() is None
