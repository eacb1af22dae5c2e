"""The process in which Triton's interpreter runs: a script, started by interpret.py with TRITON_INTERPRET=1.

It reads one JSON request per line from its standard input and answers each with one line on the pipe that was its
standard output. What the interpreter computes otherwise than a device does is put right here:
- float32 to bfloat16 rounds to nearest even (it truncates), and the way back keeps subnormal numbers
- `tl.dot` multiplies bfloat16 numbers (it multiplies their bit patterns)
- a comparison gives bools (it casts a scalar's back to the type of the operands when it broadcasts it)
- a scalar can bound a loop (not in Triton 3.6 with NumPy 2.4)
- an access outside the kernel's buffers is an error (it reads or corrupts this process)
"""

import importlib.util
import json
import os
import sys
import traceback

import numpy as np
import torch
import triton.language as tl
from safetensors.torch import load_file, save_file
from triton.runtime import interpreter

_GUARD = 4096  # bytes that belong to nobody, around every buffer


def _round_to_bfloat16(bits):
    """float32 bit patterns to bfloat16's, to nearest even; a NaN stays one."""
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(nan, (bits >> np.uint32(16)) | np.uint32(0x40), rounded).astype(np.uint16)


class Bounds:
    """The addresses that the running kernel may touch."""

    def __init__(self):
        self.starts = np.zeros(0, np.uint64)
        self.ends = np.zeros(0, np.uint64)

    def allow(self, tensors):
        spans = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors if t.numel())
        self.starts = np.array([s for s, _ in spans], np.uint64)
        self.ends = np.array([e for _, e in spans], np.uint64)

    def check(self, pointers, mask, what):
        addresses, active = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[active]
        if not addresses.size:
            return
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        at = np.searchsorted(self.starts, addresses, side="right") - 1
        inside = at >= 0
        inside[inside] = addresses[inside] + np.uint64(size) <= self.ends[at[inside]]
        if not inside.all():
            bad = int(addresses[~inside][0])
            near = min(range(len(self.starts)), key=lambda i: abs(int(self.starts[i]) - bad), default=None)
            where = "" if near is None else f", {bad - int(self.starts[near])} bytes from the start of the nearest buffer"
            raise IndexError(f"{what} outside the buffers: {int((~inside).sum())} of {inside.size} lanes{where}")


def correct_interpreter(bounds):
    """Put right what the docstring of this module lists."""
    builder = interpreter.InterpreterBuilder
    convert, dot = interpreter._convert_float, builder.create_dot
    patch_tensor = interpreter._patch_lang_tensor
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw

    def convert_float(data, source, target, rounding):
        if source == tl.float32 and target == tl.bfloat16:
            return _round_to_bfloat16(np.ascontiguousarray(data).view(np.uint32))
        if source == tl.bfloat16 and target == tl.float32:
            return data.astype(np.uint32) << np.uint32(16)
        return convert(data, source, target, rounding)

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *args):
        return dot(self, widened(a), widened(b), *args)

    def giving_bools(compare):
        def compared(self, a, b):
            return interpreter.TensorHandle(compare(self, a, b).data.astype(bool), tl.int1)

        return compared

    def create_masked_load(self, pointers, mask, *args, **named):
        bounds.check(pointers, mask, "load")
        return load(self, pointers, mask, *args, **named)

    def create_masked_store(self, pointers, value, mask, *args, **named):
        bounds.check(pointers, mask, "store")
        return store(self, pointers, value, mask, *args, **named)

    def create_atomic_rmw(self, op, pointers, value, mask, *args):
        bounds.check(pointers, mask, "atomic add")
        return atomic(self, op, pointers, value, mask, *args)

    def patch_lang_tensor(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    for name in dir(builder):
        if name.startswith(("create_icmp", "create_fcmp")):
            setattr(builder, name, giving_bools(getattr(builder, name)))
    interpreter._convert_float = convert_float
    interpreter._patch_lang_tensor = patch_lang_tensor
    for function in (create_dot, create_masked_load, create_masked_store, create_atomic_rmw):
        setattr(builder, function.__name__, function)


def _guarded(tensor):
    """A copy of `tensor` amid bytes that read as NaN or -1."""
    size = tensor.numel() * tensor.element_size()
    memory = torch.full((size + 2 * _GUARD,), 255, dtype=torch.uint8)
    copy = memory[_GUARD : _GUARD + size].view(tensor.dtype)
    copy.copy_(tensor)
    return copy


def _module(path, cache):
    if path not in cache:
        spec = importlib.util.spec_from_file_location(f"plait_interpreted_{len(cache)}", path)
        assert spec is not None and spec.loader is not None
        cache[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cache[path])
    return cache[path]


def run(request, modules, bounds):
    """Run one kernel and write the buffers it may have changed."""
    buffers = {name: _guarded(tensor) for name, tensor in load_file(request["tensors"]).items()}
    bounds.allow(buffers.values())
    function = getattr(_module(request["module"], modules), request["function"])
    args = [buffers[name] for name in request["buffers"]]
    function[(request["grid"],)](*args, *request["sizes"], **request["tiles"])
    save_file({name: buffers[name].clone() for name in request["results"]}, request["results_file"])


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a kernel prints must not mix with the answers
    np.seterr(all="ignore")  # kernels compute in lanes whose results nobody reads
    torch.set_num_threads(1)
    bounds, modules = Bounds(), {}
    correct_interpreter(bounds)
    for line in sys.stdin:
        try:
            run(json.loads(line), modules, bounds)
            answer = {}
        except Exception as error:  # the parent raises it
            while error.__cause__ is not None:  # the interpreter wraps an error once per function
                error = error.__cause__
            answer = {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
