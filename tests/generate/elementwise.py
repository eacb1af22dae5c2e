"""Catalogue, first part: elementwise ops with type promotion, comparisons, casts, in-place updates."""

from __future__ import annotations

from .builder import FLOATS, INTS, Builder, Draft, NoCandidate
from .program import names_in

# what rounds nothing: another implementation must agree bit for bit, NaN and infinities included
EXACT_UNARY = (
    "-{x}", "torch.neg({x})", "{x}.abs()", "torch.sign({x})", "torch.sgn({x})", "F.relu({x})", "torch.relu({x})",
    "torch.floor({x})", "torch.ceil({x})", "torch.trunc({x})", "torch.round({x})", "F.relu6({x})", "F.hardtanh({x})",
    "torch.clamp({x}, -1, 1)", "torch.clamp({x}, min=0)", "{x}.clamp_max(2)", "torch.nan_to_num({x})",
    "torch.positive({x})",
    "torch.nan_to_num({x}, nan=0.5, posinf=3.0, neginf=-3.0)", "F.threshold({x}, 0.1, 20.0)", "{x}.clone()",
    "torch.frac({x})", "{x}.contiguous()", "torch.zeros_like({x})", "torch.ones_like({x})", "torch.full_like({x}, 2)",
)  # fmt: skip
EXACT_TESTS = (
    "torch.isnan({x})", "torch.isinf({x})", "torch.isfinite({x})", "torch.logical_not({x})", "torch.signbit({x})",
    "{x} != {x}", "torch.isposinf({x})", "{x} > 0", "{x} <= 0.5", "{x} == 0",
)  # fmt: skip
ROUNDED_UNARY = (
    "torch.exp({x})", "torch.expm1({x})", "torch.exp2({x})", "torch.log({x})", "torch.log1p({x})", "torch.log2({x})",
    "torch.log10({x})", "torch.sqrt({x})", "torch.rsqrt({x})", "torch.sin({x})", "torch.cos({x})", "torch.tan({x})",
    "torch.tanh({x})", "torch.sigmoid({x})", "torch.erf({x})", "torch.erfc({x})", "torch.asin({x})", "torch.acos({x})",
    "torch.atan({x})", "torch.sinh({x})", "torch.cosh({x})", "torch.asinh({x})", "torch.acosh({x})", "torch.atanh({x})",
    "torch.reciprocal({x})", "torch.square({x})", "torch.lgamma({x})", "torch.sinc({x})", "torch.deg2rad({x})",
    "torch.log({x}.abs() + 0.5)", "torch.sqrt({x}.abs())", "torch.rsqrt({x} * {x} + 1e-5)", "torch.exp(-{x}.abs())",
    "torch.logit({x}, eps=0.01)", "torch.exp({x}.clamp(max=4))", "1 / (1 + {x}.abs())", "{x} ** 2", "{x} ** 3",
    "{x} ** 0.5",
)  # fmt: skip
ACTIVATIONS = (
    "F.gelu({x})", "F.gelu({x}, approximate='tanh')", "F.silu({x})", "F.mish({x})", "F.softplus({x})", "F.elu({x})",
    "F.selu({x})", "F.celu({x}, 0.7)", "F.logsigmoid({x})", "F.softsign({x})", "F.tanhshrink({x})", "F.hardsigmoid({x})",
    "F.hardswish({x})", "F.leaky_relu({x}, 0.1)", "F.softshrink({x})", "F.hardshrink({x})", "F.glu({x}, -1)",
)  # fmt: skip

RING_BINARY = (
    "{x} + {y}",
    "{x} - {y}",
    "{x} * {y}",
    "{y} - {x}",
    "torch.add({x}, {y}, alpha=2)",
    "torch.sub({x}, {y}, alpha=3)",
)
EXACT_BINARY = (
    "torch.maximum({x}, {y})", "torch.minimum({x}, {y})", "torch.fmax({x}, {y})", "torch.fmin({x}, {y})",
    "{x} == {y}", "{x} != {y}", "{x} < {y}", "{x} <= {y}", "{x} > {y}", "{x} >= {y}", "torch.logical_and({x}, {y})",
    "torch.logical_or({x}, {y})", "torch.logical_xor({x}, {y})", "torch.copysign({x}, {y})", "torch.heaviside({x}, {y})",
)  # fmt: skip
ROUNDED_BINARY = (
    "{x} / {y}", "{y} / {x}", "torch.div({x}, {y}, rounding_mode='floor')", "torch.div({x}, {y}, rounding_mode='trunc')",
    "{x} // {y}", "torch.remainder({x}, {y})", "torch.fmod({x}, {y})", "torch.atan2({x}, {y})", "torch.pow({x}, {y})",
    "torch.pow({x}.abs() + 0.5, {y})", "torch.hypot({x}, {y})", "torch.logaddexp({x}, {y})", "torch.xlogy({x}, {y})",
    "{x} / ({y}.abs() + 0.5)", "torch.float_power({x}, {y})",
)  # fmt: skip
TENSOR_ONLY = (
    "maximum",
    "minimum",
    "fmax",
    "fmin",
    "logical",
    "copysign",
    "heaviside",
    "atan2",
    "hypot",
    "logaddexp",
    ".abs()",
)
INT_UNARY = ("~{x}", "{x} << 1", "{x} >> 1", "{x} & 3", "{x} | 4", "{x} ^ 5", "{x} % 3", "{x} // 2", "{x} * {x}", "{x} + 1")
TERNARY = (
    ("torch.addcmul({x}, {y}, {z}, value=0.5)", "rounded"), ("torch.addcmul({x}, {y}, {z})", "ring"),
    ("torch.lerp({x}, {y}, 0.3)", "rounded"), ("{x} * {y} + {z}", "ring"),
    ("torch.addcdiv({x}, {y}, {z}.abs() + 1)", "rounded"),
    ("torch.clamp({x}, {y}, {z})", "exact"), ("torch.where({x} > 0, {y}, {z})", "exact"), ("({x} - {y}) * {z}", "ring"),
)  # fmt: skip
IN_PLACE = (
    ("{x}.add_({y})", "ring"), ("{x}.mul_({y})", "ring"), ("{x}.sub_({y})", "ring"), ("{x} += {y}", "ring"),
    ("{x}.copy_({y})", "exact"), ("{x}.div_(2)", "rounded"), ("{x}.clamp_(-1, 1)", "exact"), ("{x}.relu_()", "exact"),
    ("{x}.fill_(1.5)", "exact"), ("{x}.zero_()", "exact"), ("{x}.neg_()", "exact"),
    ("{x}.masked_fill_({x} > 1, 0.25)", "exact"),
    ("{x}.tanh_()", "rounded"), ("{x}.exp_()", "rounded"), ("{x}[..., 0] = {y}[..., 0]", "exact"), ("{x}[0] = 2",
    "exact"),
    ("{x}[..., ::2] = 0.5", "exact"), ("{x}[1:].mul_(2)", "ring"), ("{x}.select(0, 0).add_(1)", "ring"),
    ("{x}.flatten()[0] = 3", "exact"), ("{x}.view(-1).sub_(1)", "ring"), ("{x}.copy_({x}.flip(0))", "exact"),
    ("{x}.add_({x}.flip(-1))", "ring"), ("{x}.mul_({x}.roll(1, 0))", "ring"), ("{x}.copy_({x}.cumsum(0))", "rounded"),
    ("{x}[1:] = {x}[:-1].clone()", "exact"), ("{x}.sub_({x}.mean(0))", "rounded"),
    ("{x}.copy_({x}.mT.contiguous())", "exact"),
)  # fmt: skip


def _reads(b: Builder, *operands: str) -> tuple[str, ...]:
    """The variables among operands, which may also be numbers or `x.shape[i]`."""
    return tuple(n for o in operands for n in names_in(o) if n in b.names)


def exact_unary(b: Builder) -> Draft:
    x = b.pick("number")
    return Draft(b.rng.choice(EXACT_UNARY).format(x=x), (x,), numerics="exact")


def tests(b: Builder) -> Draft:
    x = b.pick()
    return Draft(b.rng.choice(EXACT_TESTS).format(x=x), (x,), numerics="exact")


def rounded_unary(b: Builder) -> Draft:
    x = b.pick("float" if b.rng.random() < 0.85 else "number")
    return Draft(b.rng.choice(ROUNDED_UNARY).format(x=x), (x,))


def activation(b: Builder) -> Draft:
    x = b.pick("float")
    return Draft(b.rng.choice(ACTIVATIONS).format(x=x), (x,))


def int_unary(b: Builder) -> Draft:
    x = b.pick("int")
    return Draft(b.rng.choice(INT_UNARY).format(x=x), (x,), numerics="exact")


def _binary(b: Builder, table: tuple[str, ...], numerics: str) -> Draft:
    text = b.rng.choice(table)
    x = b.pick()
    y = b.partner(x, scalars=not any(word in text for word in TENSOR_ONLY))
    reads = _reads(b, x, y)
    return Draft(text.format(x=x, y=y), reads, numerics=numerics)


def ring_binary(b: Builder) -> Draft:
    return _binary(b, RING_BINARY, "ring")


def exact_binary(b: Builder) -> Draft:
    return _binary(b, EXACT_BINARY, "exact")


def rounded_binary(b: Builder) -> Draft:
    return _binary(b, ROUNDED_BINARY, "rounded")


def ternary(b: Builder) -> Draft:
    text, numerics = b.rng.choice(TERNARY)
    x = b.pick("number")
    y, z = (b.partner(x, "number", scalars=False) for _ in range(2))
    return Draft(text.format(x=x, y=y, z=z), (x, y, z), numerics=numerics)


def where(b: Builder) -> Draft:
    x = b.pick("number")
    mask = b.partner(x, "bool", scalars=False)
    y = b.partner(x, "number")
    form = b.rng.choice(["torch.where({m}, {x}, {y})", "torch.where(~{m}, {y}, {x})", "{x}.masked_fill({m}, 0.5)"])
    reads = _reads(b, x, mask, y)
    return Draft(form.format(m=mask, x=x, y=y), reads, numerics="exact")


def cast(b: Builder) -> Draft:
    """To any dtype; floats become integers only from a range that every integer dtype can hold."""
    x = b.pick()
    kind = b.rng.choices(["float", "int", "bool"], weights=[6, 3, 1])[0]
    if kind == "float":
        return Draft(f"{x}.to({b.rng.choice(FLOATS)})", (x,))
    if kind == "bool":
        return Draft(f"{x}.to(torch.bool)", (x,), numerics="exact")
    dtype = b.rng.choice(INTS)
    if b.tensor(x).dtype.is_floating_point:
        low = 0 if "uint8" in str(dtype) else -100
        return Draft(f"torch.nan_to_num({x}, nan=1.0).clamp({low}, 100).to({dtype})", (x,), numerics="exact")
    return Draft(f"{x}.to({dtype})", (x,), numerics="exact")


def in_place(b: Builder) -> Draft:
    """Update a value (seldom an input); views of it see the change."""
    text, numerics = b.rng.choice(IN_PLACE)
    x = b.pick("float" if b.rng.random() < 0.8 else "number", writable=True)
    if "{y}" not in text:
        return Draft(text.format(x=x), (x,), numerics=numerics, mutates=(x,))
    y = b.partner(x, "number", scalars="[" not in text)
    if y == x and "copy_" in text:
        raise NoCandidate("itself")
    reads = _reads(b, x, y)
    return Draft(text.format(x=x, y=y), reads, numerics=numerics, mutates=(x,))


def exchange(b: Builder) -> Draft:
    """Two values trade contents, or one moves on to the next: an order of writes that loses nothing must be found."""
    if b.rng.random() < 0.5:
        x = b.pick("number", ndim=(1, 4), writable=True)
        y = b.pick("number", where=lambda n: n != x and b.dims(n) == b.dims(x), writable=True)
    else:  # two arguments: what the caller sees changes
        x = b.pick("number", ndim=(1, 4), where=lambda n: n in [i.name for i in b.inputs])
        y = b.fresh(b.dims(x), "float")
    forms = ("{x}[...], {y}[...] = {y}.clone(), {x}.clone()", "{x}[...], {y}[...] = {y} + 1, {x} * 2")
    i = b.rng.randrange(2)
    return Draft(forms[i].format(x=x, y=y), (x, y), numerics=("exact", "ring")[i], mutates=(x, y))


def size_arithmetic(b: Builder) -> Draft:
    """A size as a number, and tensors made of nothing but sizes."""
    x = b.pick("float", ndim=(1, 9))
    i = b.axis(x)
    forms = (
        ("{x} / {x}.shape[{i}]", "rounded"), ("{x} * {x}.shape[{i}] ** -0.5", "rounded"), ("{x} + {x}.shape[{i}]",
        "ring"),
        ("torch.arange({x}.shape[{i}])", "exact"), ("torch.arange({x}.shape[{i}], dtype=torch.float32) / 4", "exact"),
        ("torch.full(({x}.shape[{i}], 2), 0.5)", "exact"), ("{x}.new_zeros({x}.shape[{i}], 3)", "exact"),
        ("torch.eye({x}.shape[{i}])", "exact"), ("torch.ones({x}.shape[{i}] + 1, dtype=torch.int32)", "exact"),
        ("torch.linspace(0, 1, {x}.shape[{i}])", "rounded"), ("{x}.numel() + {x}", "ring"),
    )  # fmt: skip
    text, numerics = b.rng.choice(forms)
    return Draft(text.format(x=x, i=i), (x,), numerics=numerics)
