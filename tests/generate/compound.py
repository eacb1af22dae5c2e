"""Catalogue, third part: reductions, normalisations, scans and sorts, the matmul family, convolution and pooling."""

from __future__ import annotations

from .builder import Builder, Draft, NoCandidate

SUMS = (
    ("{x}.sum({d})", "ring"), ("{x}.sum({d}, keepdim=True)", "ring"), ("{x}.sum()", "ring"),
    ("torch.nansum({x}, {d})", "ring"),
    ("{x}.mean({d})", "rounded"), ("{x}.mean({d}, keepdim=True)", "rounded"), ("{x}.mean()", "rounded"),
    ("{x}.sum({d}, dtype=torch.float32)", "ring"), ("torch.count_nonzero({x}, {d})", "exact"), ("{x}.prod({d})",
    "rounded"),
    ("torch.var({x}, {d})", "rounded"), ("torch.std({x}, {d}, keepdim=True)", "rounded"),
    ("torch.var({x}, {d}, correction=0)", "rounded"), ("torch.logsumexp({x}, {d})", "rounded"),
    ("torch.linalg.vector_norm({x}, dim={d})", "rounded"), ("{x}.norm()", "rounded"),
    ("torch.linalg.vector_norm({x}, float('inf'), dim={d})", "exact"), ("torch.linalg.vector_norm({x}, 1, dim={d})",
    "ring"),
    ("{x}.cumsum({d})", "ring"), ("{x}.cumprod({d})", "rounded"), ("torch.logcumsumexp({x}, {d})", "rounded"),
    ("({x} - {x}.mean({d}, keepdim=True)) * torch.rsqrt({x}.var({d}, keepdim=True, correction=0) + 1e-5)", "rounded"),
    ("{x} * torch.rsqrt({x}.pow(2).mean({d}, keepdim=True) + 1e-6)", "rounded"), ("torch.trapezoid({x}, dim={d})",
    "rounded"),
)  # fmt: skip
PICKS = (
    "{x}.amax({d})", "{x}.amin({d}, keepdim=True)", "{x}.max()", "{x}.min()", "{x}.argmax({d})", "{x}.argmin({d})",
    "{x}.argmax({d}, keepdim=True)", "(({x} > 0)).any({d})", "({x} == {x}).all({d})", "{x}.cummax({d}).values",
    "{x}.cummin({d}).values", "torch.sort({x}, dim={d}, stable=True).values", "torch.argsort({x}, dim={d}, stable=True)",
    "torch.sort({x}, dim={d}, descending=True, stable=True).values", "{x}.topk(1, {d}).values", "{x}.topk(2, {d}).values",
    "{x}.kthvalue(1, {d}).values", "torch.diff({x}, dim={d})", "{x}.median({d}).values", "{x}.nanmedian()",
    "torch.argmax({x})",
)  # fmt: skip
PAIRS = (
    ("torch.var_mean({x}, {d})", "rounded"), ("torch.aminmax({x}, dim={d})", "exact"), ("torch.max({x}, {d})", "exact"),
    ("torch.min({x}, {d}, keepdim=True)", "exact"), ("torch.sort({x}, dim={d}, stable=True)", "exact"),
    ("torch.std_mean({x}, {d}, keepdim=True)", "rounded"), ("torch.frexp({x})", "exact"),
)  # fmt: skip
NORMS = (
    "F.softmax({x}, {d})", "F.log_softmax({x}, {d})", "F.softmax({x}, {d}, dtype=torch.float32)", "F.softmin({x}, {d})",
    "F.layer_norm({x}, {x}.shape[-1:])", "F.rms_norm({x}, {x}.shape[-1:], eps=1e-5)",
    "F.normalize({x}, dim={d}, eps=1e-2)",
    "F.layer_norm({x}, {x}.shape[-2:])", "F.group_norm({x}, 1)", "F.instance_norm({x}[None] if {x}.ndim == 2 else {x})",
    "F.softmax({x}.masked_fill({x} > 1, float('-inf')), {d})",
)  # fmt: skip
LOSSES = (
    "F.mse_loss({x}, {y})", "F.l1_loss({x}, {y}, reduction='none')", "F.smooth_l1_loss({x}, {y})",
    "F.huber_loss({x}, {y})",
    "F.binary_cross_entropy_with_logits({x}, {y}.sigmoid())",
    "F.kl_div(F.log_softmax({x}, -1), F.softmax({y}, -1), reduction='sum')",
    "F.cosine_similarity({x}, {y}, dim=-1, eps=1e-2)", "torch.cdist({x}, {y})", "F.pairwise_distance({x}, {y})",
    "F.cross_entropy({x}, F.softmax({y}, 1))",
)  # fmt: skip


def _reduced(b: Builder, kind: str) -> tuple[str, str]:
    """A tensor and one dimension or a few."""
    x = b.pick(kind, ndim=(1, 5))
    return x, str(b.axis(x))


def sums(b: Builder) -> Draft:
    x, dim = _reduced(b, "float" if b.rng.random() < 0.8 else "any")
    text, numerics = b.rng.choice(SUMS)
    ndim = b.tensor(x).ndim
    several = "sum(" in text or "mean(" in text or "var(" in text or "logsumexp" in text
    if several and "cumsum" not in text and ndim >= 2 and b.rng.random() < 0.3:
        dim = str(tuple(b.rng.sample(range(ndim), 2)))
    return Draft(text.format(x=x, d=dim), (x,), numerics=numerics, degree=1)


def picks(b: Builder) -> Draft:
    x, dim = _reduced(b, "number")
    return Draft(b.rng.choice(PICKS).format(x=x, d=dim), (x,), numerics="exact")


def pairs(b: Builder) -> Draft:
    x, dim = _reduced(b, "float")
    text, numerics = b.rng.choice(PAIRS)
    if "_mean(" in text:  # of a row with an infinity eager gives NaN or infinity, as its one pass came upon it
        text = text.replace("{x}", "{x}.nan_to_num(posinf=3, neginf=-3)")
    return Draft(text.format(x=x, d=dim), (x,), outs=2, numerics=numerics, degree=int(numerics == "rounded"))


def norms(b: Builder) -> Draft:
    x, dim = _reduced(b, "float")
    return Draft(b.rng.choice(NORMS).format(x=x, d=dim), (x,), degree=0)


def losses(b: Builder) -> Draft:
    x = b.pick("float", ndim=(1, 4))
    y = b.pick("float", where=lambda n: b.dims(n) == b.dims(x) and b.tensor(n).dtype == b.tensor(x).dtype)
    return Draft(b.rng.choice(LOSSES).format(x=x, y=y), (x, y))


def affine_norm(b: Builder) -> Draft:
    """Layer, batch or group normalisation with weights."""
    x = b.pick("float", ndim=(2, 4), where=lambda n: all(min(d) > 0 for d in b.dims(n)))
    dims, dtype = b.dims(x), b.tensor(x).dtype
    channel = b.rng.random() < 0.5
    weight, bias = (b.fresh((dims[1 if channel else -1],), "float", dtype=dtype) for _ in range(2))
    if channel:
        mean = f"{x}.mean({[i for i in range(len(dims)) if i != 1]})"
        forms = [f"F.batch_norm({x}, {mean}, torch.ones_like({weight}), {weight}, {bias})",
                 f"F.batch_norm({x}, None, None, {weight}, {bias}, training=True)",
                 f"F.group_norm({x}, 1, {weight}, {bias})"]  # fmt: skip
    else:
        forms = [
            f"F.layer_norm({x}, {x}.shape[-1:], {weight}, {bias})",
            f"F.rms_norm({x}, {x}.shape[-1:], {weight}) + {bias}",
        ]
    return Draft(b.rng.choice(forms), (x, weight, bias))


def linear(b: Builder) -> Draft:
    """A matrix product with a fresh weight, at times with bias and activation."""
    x = b.pick("float", ndim=(1, 4), where=lambda n: max(map(max, b.dims(n))) <= 40)
    dims, dtype = b.dims(x), b.tensor(x).dtype
    width = b.rng.choice([1, 2, 3, 5, 8, 16])
    weight = b.fresh(((width,) * len(b.sizes), dims[-1]), "float", dtype=dtype)
    forms = [f"F.linear({x}, {weight})", f"{x} @ {weight}.t()", f"torch.matmul({x}, {weight}.mT)",
             f"F.linear({x}, {weight}, {weight}[:, 0])",
             f"F.relu(F.linear({x}, {weight}))", f"F.gelu({x} @ {weight}.t())",
             f"F.linear({x}, {weight}) * 0.5 + 1"]  # fmt: skip
    if len(dims) == 2:
        forms += [f"torch.addmm({weight}[:, 0], {x}, {weight}.t())", f"torch.mm({x}, {weight}.t())",
                  f"torch.addmm({weight}[:, 0], {x}, {weight}.t(), beta=0.5, alpha=2)"]  # fmt: skip
    text = b.rng.choice(forms)
    ring = "gelu" not in text and "0.5" not in text
    return Draft(text, (x, weight), numerics="ring" if ring else "rounded", degree=2)


def products(b: Builder) -> Draft:
    """Products of values that are there already."""
    x = b.pick("float", ndim=(1, 4))
    dtype, dims = b.tensor(x).dtype, b.dims(x)
    y = b.pick("float", where=lambda n: b.tensor(n).dtype == dtype and b.dims(n) == dims)
    forms = [
        f"{x} @ {y}.mT",
        f"{x}.mT @ {y}",
        f"torch.einsum('...ij,...kj->...ik', {x}, {y})",
        f"torch.matmul({x}, {y}.mT) / 4",
    ]
    if len(dims) == 1:
        forms = [f"torch.dot({x}, {y})", f"torch.outer({x}, {y})", f"torch.einsum('i,j->ji', {x}, {y})"]
    if len(dims) == 3:
        forms += [f"torch.bmm({x}, {y}.mT)", f"torch.baddbmm({x} @ {y}.mT, {x}, {y}.mT, alpha=0.5)"]
    if len(dims) >= 3:
        forms += [
            f"F.scaled_dot_product_attention({x}, {y}, {y})",
            f"F.scaled_dot_product_attention({x}, {y}, {x}, is_causal=True)",
        ]
    text = b.rng.choice(forms)
    ring = "attention" not in text and "alpha" not in text and "/" not in text
    return Draft(text, (x, y), numerics="ring" if ring else "rounded", degree=2)


def convolution(b: Builder) -> Draft:
    """A 1-d or 2-d convolution or pooling over (batch, channels, space)."""
    x = b.pick("float", ndim=(3, 4), where=lambda n: all(min(d) > 0 for d in b.dims(n)) and max(b.dims(n)[1]) <= 16)
    dims, dtype = b.dims(x), b.tensor(x).dtype
    n = len(dims) - 2
    if b.rng.random() < 0.45:
        forms = [f"F.avg_pool{n}d({x}, 2)", f"F.max_pool{n}d({x}, 2)", f"F.max_pool{n}d({x}, 3, stride=1, padding=1)",
                 f"F.adaptive_avg_pool{n}d({x}, 1)", f"F.interpolate({x}, scale_factor=2)",
                 f"F.avg_pool{n}d({x}, 3, stride=2, padding=1)",
                 f"F.interpolate({x}, scale_factor=2, mode='{['linear', 'bilinear'][n - 1]}')"]  # fmt: skip
        return Draft(b.rng.choice(forms), (x,))
    if len(set(dims[1])) != 1:
        raise NoCandidate("channels vary")
    fixed = [(k,) * len(b.sizes) for k in (b.rng.choice([1, 2, 4]), 1 if b.rng.random() < 0.4 else 3)]
    weight = b.fresh((fixed[0], dims[1], *(fixed[1],) * n), "float", dtype=dtype)
    options = b.rng.choice(["", ", padding=1", ", stride=2, padding=1", ", padding=2, dilation=2"])
    return Draft(f"F.conv{n}d({x}, {weight}{options})", (x, weight), degree=2)


def target_loss(b: Builder) -> Draft:
    """Cross entropy against class indices."""
    x = b.pick("float", ndim=(2, 2), where=lambda n: all(min(d) > 0 for d in b.dims(n)))
    dims = b.dims(x)
    target = b.fresh((dims[0],), "index", high=min(dims[1]))
    options = b.rng.choice(["", ", reduction='none'", ", label_smoothing=0.1", ", ignore_index=0", ", reduction='sum'"])
    return Draft(f"F.cross_entropy({x}, {target}{options})", (x, target))
