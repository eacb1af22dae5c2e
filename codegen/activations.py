"""Lowerings of activations, and of the backward formulas that autograd leaves whole."""

from __future__ import annotations

import math

from .lowering import At, lowers

# -- activations ------------------------------------------------------------------------------------------------------


def relu(at: At, x: str) -> str:
    """max(x, 0)."""
    return at.op("maximum", x, at.const(0))


def silu(at: At, x: str) -> str:
    """x / (1 + exp(-x))."""
    return at.op("div", x, at.op("add", at.const(1), at.op("exp", at.op("neg", x))))


def gelu(at: At, x: str, approximate: str) -> str:
    """x times the normal distribution's function at x, by erf ("none") or as in the paper by tanh ("tanh")."""
    half, one = at.const(0.5), at.const(1)
    if approximate == "tanh":
        inner = at.op("mul", at.op("mul", at.op("mul", x, x), x), at.const(0.044715))
        inner = at.op("mul", at.const(math.sqrt(2 / math.pi)), at.op("add", x, inner))
        return at.op("mul", at.op("mul", half, x), at.op("add", one, at.op("tanh", inner)))
    erf = at.op("erf", at.op("mul", x, at.const(math.sqrt(0.5))))
    return at.op("mul", at.op("mul", x, half), at.op("add", one, erf))


@lowers("aten.relu.default", cheap=True)
def _relu(at: At) -> str:
    return relu(at, at.operand(at["self"]))


@lowers("aten.relu6.default", cheap=True)
def _relu6(at: At) -> str:
    return at.op("minimum", at.op("maximum", at.operand(at["self"]), at.const(0)), at.const(6))


@lowers("aten.silu.default")
def _silu(at: At) -> str:
    return silu(at, at.operand(at["self"]))


@lowers("aten.gelu.default")
def _gelu(at: At) -> str:
    return gelu(at, at.operand(at["self"]), at["approximate"])


@lowers("aten.hardswish.default")
def _hardswish(at: At) -> str:
    x = at.operand(at["self"])
    gate = at.op("minimum", at.op("maximum", at.op("add", x, at.const(3)), at.const(0)), at.const(6))
    return at.op("div", at.op("mul", x, gate), at.const(6))


@lowers("aten.hardsigmoid.default")
def _hardsigmoid(at: At) -> str:
    x = at.operand(at["self"])
    return at.op(
        "div", at.op("minimum", at.op("maximum", at.op("add", x, at.const(3)), at.const(0)), at.const(6)), at.const(6)
    )


@lowers("aten.leaky_relu.default", cheap=True)
def _leaky_relu(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("where", at.op("gt", x, at.const(0)), x, at.op("mul", x, at.operand(at["negative_slope"])))


@lowers("aten.elu.default")
def _elu(at: At) -> str:
    x = at.operand(at["self"])
    scale, alpha = at.operand(at["scale"]), at.operand(at["alpha"])
    low = at.op("mul", at.op("expm1", at.op("mul", x, at.operand(at["input_scale"]))), alpha)
    return at.op("where", at.op("le", x, at.const(0)), at.op("mul", low, scale), at.op("mul", x, scale))


@lowers("aten.softplus.default")
def _softplus(at: At) -> str:
    x, beta = at.operand(at["self"]), at.operand(at["beta"])
    scaled = at.op("mul", x, beta)
    soft = at.op("div", at.op("log1p", at.op("exp", scaled)), beta)
    return at.op("where", at.op("gt", scaled, at.operand(at["threshold"])), x, soft)


@lowers("aten.mish.default")
def _mish(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("mul", x, at.op("tanh", at.op("log1p", at.op("exp", x))))


@lowers("aten.logit.default")
def _logit(at: At) -> str:
    x = at.operand(at["self"])
    eps = at["eps"]
    if eps is not None:
        low, high = at.const(eps), at.const(1 - eps)
        x = at.op("where", at.op("lt", x, low), low, at.op("where", at.op("gt", x, high), high, x))
    return at.op("log", at.op("div", x, at.op("sub", at.const(1), x)))


@lowers("aten.threshold.default", cheap=True)
def _threshold(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("where", at.op("le", x, at.operand(at["threshold"])), at.operand(at["value"]), x)


# -- backward formulas that autograd leaves whole -----------------------------------------------------------------------


@lowers("aten.threshold_backward.default", cheap=True)
def _threshold_backward(at: At) -> str:
    x = at.operand(at["self"])
    return at.op("where", at.op("le", x, at.operand(at["threshold"])), at.const(0), at.operand(at["grad_output"]))


@lowers("aten.tanh_backward.default", cheap=True)
def _tanh_backward(at: At) -> str:
    y = at.operand(at["output"])
    return at.op("mul", at.operand(at["grad_output"]), at.op("sub", at.const(1), at.op("mul", y, y)))


@lowers("aten.sigmoid_backward.default", cheap=True)
def _sigmoid_backward(at: At) -> str:
    y = at.operand(at["output"])
    return at.op("mul", at.op("mul", at.operand(at["grad_output"]), at.op("sub", at.const(1), y)), y)


def gelu_backward(at: At, grad: str, x: str, approximate: str) -> str:
    """grad times the slope of gelu at x."""
    half, one = at.const(0.5), at.const(1)
    if approximate == "tanh":
        beta, kappa = at.const(math.sqrt(2 / math.pi)), at.const(0.044715)
        square = at.op("mul", x, x)
        inner = at.op("mul", beta, at.op("add", x, at.op("mul", kappa, at.op("mul", square, x))))
        tanh = at.op("tanh", inner)
        left = at.op("mul", half, at.op("add", one, tanh))
        slope = at.op("mul", beta, at.op("add", one, at.op("mul", at.const(3 * 0.044715), square)))
        right = at.op("mul", at.op("mul", half, x), at.op("mul", at.op("sub", one, at.op("mul", tanh, tanh)), slope))
        return at.op("mul", grad, at.op("add", left, right))
    cdf = at.op("mul", half, at.op("add", one, at.op("erf", at.op("mul", x, at.const(math.sqrt(0.5))))))
    density = at.op("exp", at.op("mul", at.op("mul", x, x), at.const(-0.5)))
    pdf = at.op("mul", at.const(1 / math.sqrt(2 * math.pi)), density)
    return at.op("mul", grad, at.op("add", cdf, at.op("mul", x, pdf)))


@lowers("aten.gelu_backward.default")
def _gelu_backward(at: At) -> str:
    return gelu_backward(at, at.operand(at["grad_output"]), at.operand(at["self"]), at["approximate"])


def silu_backward(at: At, grad: str, x: str) -> str:
    """grad times the slope of silu at x."""
    one = at.const(1)
    gate = at.op("div", one, at.op("add", one, at.op("exp", at.op("neg", x))))
    return at.op("mul", at.op("mul", grad, gate), at.op("add", one, at.op("mul", x, at.op("sub", one, gate))))


@lowers("aten.silu_backward.default")
def _silu_backward(at: At) -> str:
    return silu_backward(at, at.operand(at["grad_output"]), at.operand(at["self"]))


@lowers("aten.native_dropout_backward.default", cheap=True)
def _native_dropout_backward(at: At) -> str:
    mask = at.operand(at["mask"])
    return at.op("mul", at.op("mul", at.operand(at["grad_output"]), mask), at.operand(at["scale"]))
