"""Hand-written kernels and builders of small plans, shared by the runtime's tests."""

from plait.runtime import archive
from plait.runtime.plan import Call, InputSpec, KernelSpec, Launch, OutputSpec, Plan, SymbolSpec, ValueSpec
from torch.utils import _pytree as pytree

SOURCE = r"""
#include <cstdint>
#include <unistd.h>
#define KERNEL extern "C" void
using Bufs = void* const*;
using Sizes = const int64_t*;

KERNEL add(Bufs b, Sizes s, int nt) {
  auto x = (const float*)b[0]; auto y = (const float*)b[1]; auto z = (float*)b[2];
  if (nt > 1) {
    #pragma omp parallel for num_threads(nt)
    for (int64_t i = 0; i < s[0]; ++i) z[i] = x[i] + y[i];
  } else {
    for (int64_t i = 0; i < s[0]; ++i) z[i] = x[i] + y[i];
  }
}
KERNEL twice(Bufs b, Sizes s, int) {
  auto x = (const float*)b[0]; auto y = (float*)b[1];
  for (int64_t i = 0; i < s[0]; ++i) y[i] = 2 * x[i];
}
KERNEL slow_twice(Bufs b, Sizes s, int nt) { usleep(20000); twice(b, s, nt); usleep(20000); }
KERNEL increment(Bufs b, Sizes s, int) {
  auto x = (float*)b[0];
  for (int64_t i = 0; i < s[0]; ++i) x[i] += 1;
}
KERNEL rowsum(Bufs b, Sizes s, int) {  // (rows, columns, row stride)
  auto x = (const float*)b[0]; auto y = (float*)b[1];
  for (int64_t i = 0; i < s[0]; ++i) { y[i] = 0; for (int64_t j = 0; j < s[1]; ++j) y[i] += x[i * s[2] + j]; }
}
KERNEL threads(Bufs b, Sizes, int nt) { *(int64_t*)b[0] = nt; }
KERNEL nothing(Bufs, Sizes, int) {}
"""

ACCESS = {
    "add": ("read", "read", "write"),
    "twice": ("read", "write"),
    "slow_twice": ("read", "write"),
    "increment": ("read_write",),
    "rowsum": ("read", "write"),
    "threads": ("write",),
    "nothing": ("read", "write"),
}


def tensor_input(name, shape, dtype="float32", strides="contiguous"):
    return InputSpec(name, "tensor", dtype, shape=shape, strides=contiguous(shape) if strides == "contiguous" else strides)


def contiguous(shape):
    strides, step = [], 1
    for size in reversed(shape):
        strides.insert(0, step)
        step = (
            size
            if step == 1
            else ["mul", size, step]
            if not isinstance(size, int) or not isinstance(step, int)
            else size * step
        )
    return tuple(strides)


def value(id, storage, shape, ref=None, offset=0, dtype="float32", strides=None):
    return ValueSpec(id, dtype, "cpu", shape, strides or contiguous(shape), storage, ref, offset)


def v(id):
    return {"v": id}


def call(op, args, outs, kwargs=()):
    return Call(op, tuple(args), tuple(kwargs), tuple(outs), "fallback", "test")


def make_plan(inputs, values, steps, outputs, **rest):
    used = dict.fromkeys(s.kernel for s in steps if isinstance(s, Launch))
    specs = tuple(KernelSpec(name, "cpp", "0", ACCESS[name]) for name in used)
    outs = tuple(OutputSpec("value", o) if isinstance(o, int) else o for o in outputs)
    return Plan(tuple(inputs), rest.pop("symbols", ()), tuple(values), tuple(steps), outs, specs, **rest)


def chain(n="s0", slow=False):
    """y = 2*(x + x), with one arena value, for a vector of length s0 (or the int n)."""
    symbols = (SymbolSpec("s0", 0, 0, low=0),) if n == "s0" else ()
    return make_plan(
        [tensor_input("x", (n,))],
        [value(0, "input", (n,), 0), value(1, "arena", (n,), offset=0), value(2, "fresh", (n,))],
        [Launch("add", (0, 0, 1), (n,)), Launch("slow_twice" if slow else "twice", (1, 2), (n,))],
        [2],
        symbols=symbols,
        arena=["mul", n, 4] if symbols else 4 * n,
    )


FLAGS = ("-O2", "-fPIC", "-shared", "-fopenmp")


def structure(*args, **kwargs):
    """The structure of a call with these arguments."""
    return pytree.tree_structure((args, kwargs))


def weighted():
    """y = 2*(x + w) for vectors of length 8, with one weight and one arena value."""
    values = [value(0, "input", (8,), 0), value(1, "constant", (8,), "w"), value(2, "arena", (8,)), value(3, "fresh", (8,))]
    steps = [Launch("add", (0, 1, 2), (8,)), Launch("twice", (2, 3), (8,))]
    return make_plan([tensor_input("x", (8,))], values, steps, [3], arena=32)


def edit(path, changes, manifest=lambda m: None):
    """The artifact with members changed and the manifest made to agree."""
    opened = archive.Archive(path)
    members = {name: bytes(opened.view(name)) for name in opened.names}
    for name, change in changes.items():
        members[name] = change(members[name])
    data = dict(opened.manifest)
    manifest(data)
    out = path.with_name("edited.plait")
    archive.write_archive(out, data, members)
    return out


def edit_manifest(path, change):
    return edit(path, {}, change)
