"""Catalogue, second part: views, joins and splits, indexing, padding."""

from __future__ import annotations

from .builder import Builder, Draft, NoCandidate
from .program import names_in


def permute(b: Builder) -> Draft:
    x = b.pick(ndim=(2, 5))
    ndim = b.tensor(x).ndim
    order = b.rng.sample(range(ndim), ndim)
    i, j = b.rng.sample(range(-ndim, 0), 2)
    forms = [
        f"{x}.permute({', '.join(map(str, order))})",
        f"{x}.transpose({i}, {j})",
        f"{x}.mT",
        f"torch.movedim({x}, {i}, {j})",
    ]
    return Draft(b.rng.choice(forms), (x,), numerics="exact")


def reshape(b: Builder) -> Draft:
    """Merge neighbours, split a dimension, or flatten; at times as `view`, which some strides refuse."""
    x = b.pick(ndim=(1, 5))
    dims = b.dims(x)
    way = b.rng.choice(["merge", "split", "flat", "same"])
    if way == "merge" and len(dims) >= 2:
        i = b.rng.randrange(len(dims) - 1)
        sizes = [f"{x}.shape[{k}]" for k in range(len(dims))]
        merged = ", ".join([*sizes[:i], f"{sizes[i]} * {sizes[i + 1]}", *sizes[i + 2 :]])
        return Draft(
            b.rng.choice([f"{x}.reshape({merged})", f"{x}.flatten({i}, {i + 1})", f"{x}.view({merged})"]),
            (x,),
            numerics="exact",
        )
    if way == "split":
        places = [(i, k) for i, d in enumerate(dims) for k in (2, 3, 4, 5) if all(s and s % k == 0 for s in d)]
        if not places:
            raise NoCandidate("nothing divides")
        i, k = b.rng.choice(places)
        return Draft(f"{x}.unflatten({i}, {b.rng.choice([f'({k}, -1)', f'(-1, {k})'])})", (x,), numerics="exact")
    if way == "flat":
        return Draft(b.rng.choice([f"{x}.reshape(-1)", f"{x}.ravel()", f"{x}.flatten()"]), (x,), numerics="exact")
    return Draft(f"{x}.reshape({x}.shape)", (x,), numerics="exact")


def expand(b: Builder) -> Draft:
    x = b.pick(ndim=(0, 3))
    n = b.rng.choice([1, 2, 3])
    dims = b.dims(x)
    ones = [i for i, d in enumerate(dims) if set(d) == {1}]
    if ones and b.rng.random() < 0.6:
        sizes = ["-1"] * len(dims)
        sizes[b.rng.choice(ones)] = b.size(b.rng.choice([d for name in b.names for d in b.dims(name)]))
        return Draft(f"{x}.expand({', '.join(sizes)})", (x, *(n for s in sizes for n in names_in(s))), numerics="exact")
    forms = [f"{x}.expand({n}, *{x}.shape)", f"{x}.repeat({', '.join(['2'] * max(len(dims), 1))})",
             f"torch.tile({x}, (2,))",
             f"{x}.repeat_interleave(2, 0)"]  # fmt: skip
    return Draft(b.rng.choice(forms), (x,), numerics="exact")


def slices(b: Builder) -> Draft:
    x = b.pick(ndim=(1, 5))
    ndim = b.tensor(x).ndim
    parts = []
    for _ in range(b.rng.randint(1, ndim)):
        forms = [":", "1:", ":-1", "::2", "1::2", "-3:", ":2", "1:100", "0", "-1", "None", "2:2"]
        parts.append(b.rng.choices(forms, weights=[5, 3, 3, 3, 2, 2, 2, 1, 2, 1, 1, 0.3])[0])
    lead = "..., " if b.rng.random() < 0.3 else ""
    return Draft(f"{x}[{lead}{', '.join(parts)}]", (x,), numerics="exact")


def small_views(b: Builder) -> Draft:
    x = b.pick(ndim=(1, 4))
    i = b.axis(x)
    forms = (
        "{x}.unsqueeze({i})", "{x}.squeeze()", "{x}.squeeze({i})", "{x}.flip({i})", "{x}.unfold({i}, 3, 2).clone()",
        "{x}.unfold({i}, 2, 2)", "{x}.select({i}, 0)", "{x}.narrow({i}, 1, 2)", "{x}.diagonal()",
        "torch.roll({x}, 1, {i})",
        "{x}.detach()", "torch.tril({x})", "torch.triu({x}, 1)", "{x}.T.contiguous()", "{x}.swapaxes(0, {i})",
        "torch.rot90({x})",
        "torch.atleast_2d({x})", "torch.diag_embed({x})", "{x}.as_strided(({x}.shape[0],), (1,))",
    )  # fmt: skip
    return Draft(b.rng.choice(forms).format(x=x, i=i), (x,), numerics="exact")


def join(b: Builder) -> Draft:
    """Concatenate or stack values of equal shape, parts of them, mixed dtypes at times."""
    x = b.pick(ndim=(1, 4))
    i = b.axis(x)
    y = b.same_shape(x)
    forms = (
        f"torch.cat([{x}, {y}], {i})", f"torch.stack([{x}, {y}], {i})", f"torch.cat([{x}, {y}, {x}], {i})",
        f"torch.cat([{x}.narrow({i}, 0, 1), {y}], {i})", f"torch.stack([{x}, {y}], -1).flatten(-2)",
        f"torch.hstack([{y}, {x}])",
        f"torch.cat([{x}[..., 1:], {y}[..., :1]], -1)", f"torch.cat([-{y}[..., 1::2], {y}[..., ::2]], -1)",
    )  # fmt: skip
    return Draft(b.rng.choice(forms), (x, y), numerics="exact")


def split(b: Builder) -> Draft:
    """Pieces as views of one value."""
    x = b.pick(ndim=(1, 4))
    dims = b.dims(x)
    halves = [i for i, d in enumerate(dims) if all(s >= 2 and s % 2 == 0 for s in d)]
    if halves and b.rng.random() < 0.6:
        return Draft(f"{x}.chunk(2, {b.rng.choice(halves)})", (x,), outs=2, numerics="exact")
    fixed = [(i, d[0]) for i, d in enumerate(dims) if len(set(d)) == 1 and 2 <= d[0] <= 5]
    if not fixed:
        raise NoCandidate("no dimension to split")
    i, n = b.rng.choice(fixed)
    if b.rng.random() < 0.5:
        return Draft(f"{x}.split([1, {n - 1}], {i})", (x,), outs=2, numerics="exact")
    return Draft(b.rng.choice([f"{x}.unbind({i})", f"torch.tensor_split({x}, {n}, {i})"]), (x,), outs=n, numerics="exact")


def index(b: Builder) -> Draft:
    """Read rows or elements through an index tensor."""
    x = b.pick(ndim=(1, 3), where=lambda n: all(min(d) > 0 for d in b.dims(n)))
    dims = b.dims(x)
    i = b.rng.randrange(len(dims))
    count = b.rng.choice([d for name in b.names for d in b.dims(name)] + [(3,) * len(b.sizes)])
    rows = b.fresh((count,), "index", high=min(dims[i]))
    prefix = ":, " * i
    forms = [
        f"{x}.index_select({i}, {rows})",
        f"{x}[{prefix}{rows}]",
        f"torch.take_along_dim({x}, {_shaped(rows, i, len(dims))}, {i})",
    ]
    if i == 0:
        forms += [
            f"F.embedding({rows}, {x})",
            f"{x}[{rows}.unsqueeze(-1)]",
            f"torch.gather({x}, 0, {_grown(x, rows, len(dims))})",
        ]
    return Draft(b.rng.choice(forms), (x, rows), numerics="exact")


def _shaped(rows: str, i: int, ndim: int) -> str:
    shape = ["1"] * ndim
    shape[i] = "-1"
    return f"{rows}.reshape({', '.join(shape)})"


def _grown(x: str, rows: str, ndim: int) -> str:
    return f"{_shaped(rows, 0, ndim)}.expand(-1, *{x}.shape[1:])"


def scatter(b: Builder) -> Draft:
    """Write or add through an index tensor; repeated indices only where the order cannot matter."""
    x = b.pick("number", ndim=(1, 3), where=lambda n: all(min(d) > 0 for d in b.dims(n)))
    dims = b.dims(x)
    y = b.same_shape(x, "float" if b.tensor(x).dtype.is_floating_point else "int")
    rows = b.fresh((dims[0],), "index", high=min(dims[0]))
    grown = _grown(x, rows, len(dims))
    same = f"{y}.to({x}.dtype)"
    forms = (
        (f"{x}.index_add(0, {rows}, {same})", "ring"), (f"{x}.scatter_add(0, {grown}, {same})", "ring"),
        (f"{x}.scatter(0, {grown}, 1.5)", "exact"), (f"{x}.index_fill(0, {rows}, 2)", "exact"),
        (f"torch.index_put({x}, ({rows},), {same}, accumulate=True)", "ring"),
        (f"{x}.scatter_reduce(0, {grown}, {same}, 'amax')", "exact"), (f"F.one_hot({rows}, {min(dims[0])})", "exact"),
        (f"torch.bucketize({same}, torch.linspace(-1, 1, 5, dtype={x}.dtype))", "exact"),
    )  # fmt: skip
    text, numerics = b.rng.choice(forms)
    reads = tuple(n for n in (x, y, rows) if n in names_in(text))
    return Draft(text, reads, numerics=numerics, degree=1 if numerics == "ring" else 0)


def pad(b: Builder) -> Draft:
    x = b.pick("number", ndim=(1, 4))
    forms = (
        "F.pad({x}, (1, 2))", "F.pad({x}, (0, 1), value=1.5)", "F.pad({x}, (-1, 0))", "F.pad({x}, (1, 0, 0, 2))",
        "F.pad({x}, (1, 1), mode='reflect')", "F.pad({x}, (2, 1), mode='replicate')",
        "F.pad({x}, (1, 1), mode='circular')",
        "F.pad({x}[None, None], (1, 1), value=float('-inf')).squeeze(0)",
    )  # fmt: skip
    return Draft(b.rng.choice(forms).format(x=x), (x,), numerics="exact")
