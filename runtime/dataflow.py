"""Which step reads and writes which memory, and which steps certainly happen before which others."""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property

from .calls import aliased_arguments, out_arguments, resolve_op, written_arguments
from .extents import Extents
from .layout import Layout, argument_values
from .pending import Start, is_wait, starts
from .plan import Call, Launch
from .regions import REGION_OPS


class Dataflow:
    """The accesses of a plan in order.

    `accesses[root]` lists (step, writes). A handle that an op may have made as an alias of other values (a view, a
    reshape) *borrows* their memory: each access to it is one to theirs. The last wait for a collective is an access to what
    the collective was given, which is in use until then.

    What a view of a value is written to is written in that view alone: a value that is computed in parts may be read once
    these are proven to cover what is read.

    `problems` lists reads of unwritten values and of overwritten ones, parts that overwrite each other, arena memory that
    leaves the call, accesses on different streams that no wait orders, writes to what a collective uses, results of
    collectives that something else than a wait reads or that another step gives too.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._plan = layout.plan
        self.accesses: dict[int, list[tuple[int, bool]]] = defaultdict(list)
        self.problems: list[str] = []
        self._borrowed: dict[int, set[int]] = {}
        self._overwritten: dict[int, tuple[int, int]] = {}  # input or constant -> (last step that wrote it, as which value)
        self._made: dict[int, int] = {}  # handle -> the step that made it
        self._parts: dict[int, list[int]] = defaultdict(list)  # root -> views of it that were written
        self._written = {v.id for v in layout.specs.values() if v.storage in ("input", "constant")}
        self._modes = {k.name: k.access for k in self._plan.kernels}
        self._starts = {s.step: s for s in starts(self._plan.steps)}
        self._pending = {id: s for s in self._starts.values() for id in s.results}
        self._ending: dict[int, list[Start]] = defaultdict(list)  # by last wait
        # root -> starts, whether they write it, and what they were given of it (None: memory that they may have been lent)
        self._in_use: dict[int, list[tuple[Start, bool, int | None]]] = defaultdict(list)
        self._clocks = self._make_clocks()
        for number, step in enumerate(self._plan.steps):
            if isinstance(step, Launch):
                self._launch(number, step)
            else:
                self._call(number, step)
        self._check_outputs()
        if self.streams > 1:
            self._check_races()

    @cached_property
    def extents(self) -> Extents:
        """Which bytes values take; only plans with parts need it here."""
        return Extents(self._layout)

    def _root(self, id: int) -> int:
        return self._layout.place(id)[0]

    def _storage(self, root: int) -> str:
        return self._layout.specs[root].storage

    def _touch(self, number: int, id: int, writes: bool) -> None:
        for owner in self._owners(id):
            self._access(owner, number, id, writes)

    def _owners(self, id: int) -> list[int]:
        """Whose memory a value may lie in."""
        root = self._root(id)
        return [root, *sorted(self._borrowed.get(root, ()))]

    def _access(self, owner: int, number: int, id: int, writes: bool) -> None:
        self.accesses[owner].append((number, writes))
        own = id if owner == self._root(id) else None
        for start, changes, given in self._in_use.get(owner, ()):
            ongoing = start.step < number and (start.wait is None or number < start.wait)
            if ongoing and (writes or changes) and not self._apart(own, given):
                does = "writes to" if writes else "reads"
                self.problems.append(f"step {number} {does} value {id}, which {self._name(start)} uses until its wait")

    def _apart(self, a: int | None, b: int | None) -> bool:
        """Whether two values of the same memory are proven to share no byte; None may lie anywhere in it."""
        return a is not None and b is not None and a != b and self.extents.apart(a, b)

    def _name(self, start: Start) -> str:
        step = self._plan.steps[start.step]
        assert isinstance(step, Call)
        return f"the collective {step.op} of step {start.step}"

    def _need(self, number: int, id: int) -> None:
        root = self._root(id)
        if root in self._pending:
            step = self._plan.steps[number]
            if not isinstance(step, Call) or not is_wait(step.op) or id != root:
                start = self._name(self._pending[root])
                self.problems.append(f"step {number} reads value {id}, a result of {start}, which only a wait may read")
        if not self._is_written(id):
            self.problems.append(f"step {number} reads value {id} before anything has written {self._it(root)}")
        if root in self._overwritten and self._overwritten[root][1] not in self._views(id):
            step, new = self._overwritten[root]
            self.problems.append(f"step {number} reads value {id}, which step {step} has overwritten with value {new}")
        for owner in sorted(self._borrowed.get(root, ())):
            step, new = self._overwritten.get(owner, (-1, -1))
            if step > self._made[root]:
                self.problems.append(
                    f"step {number} reads value {id}, which may lie where step {step} has written value {new}"
                )

    def _it(self, root: int) -> str:
        return "all of it" if self._parts.get(root) else "it"

    def _is_written(self, id: int) -> bool:
        """Whether all of a value has been written."""
        root = self._root(id)
        if root in self._written:
            return True
        parts = self._parts.get(root)
        if not parts:
            return False
        if not set(parts).isdisjoint(self._views(id)):
            return True
        if not self.extents.covered(id, filter(self.extents.gapless, parts)):
            return False
        if id == root:
            self._written.add(root)
        return True

    def _write(self, number: int, id: int) -> None:
        """Note that a step has written a value."""
        root = self._root(id)
        if id == root:
            self._written.add(root)
        elif self._storage(root) in ("arena", "fresh") and id not in self._parts[root]:
            self._write_part(number, root, id)

    def _write_part(self, number: int, root: int, id: int) -> None:
        for other in self._parts[root]:
            nested = other in self._views(id) or id in self._views(other)
            if not nested and not self._apart(id, other):
                self.problems.append(f"step {number} writes value {id}, which may share bytes with value {other}")
        self._parts[root].append(id)

    def _views(self, id: int) -> list[int]:
        """A value, what it is a view of, what that is a view of, up to its root."""
        chain = [id]
        while (spec := self._layout.specs[chain[-1]]).storage == "view":
            chain.append(spec.ref)  # type: ignore[arg-type]
        return chain

    def _overwrite(self, number: int, id: int) -> None:
        root = self._root(id)
        if self._storage(root) in ("input", "constant"):
            self._overwritten[root] = number, id

    def _launch(self, number: int, step: Launch) -> None:
        written: list[int] = []
        modes = list(zip(step.buffers, self._modes[step.kernel], strict=True))
        read = {self._root(id): id for id, mode in modes if mode == "read"}
        for id, mode in modes:
            root = self._root(id)
            if mode == "write" and root in read and self._storage(root) in ("input", "constant"):
                self.problems.append(f"step {number} reads value {read[root]} and overwrites it with value {id}")
        for id, mode in modes:
            root = self._root(id)
            if self._storage(root) == "scalar":
                self.problems.append(f"step {number} gives the number {id} to a kernel as a buffer")
            elif mode != "write" or self._storage(root) == "handle":
                self._need(number, id)
            self._touch(number, id, mode != "read")
            if mode != "read":
                written.append(id)
                if self._borrowed.get(root):
                    lent = ", ".join(map(str, sorted(self._borrowed[root])))
                    self.problems.append(f"step {number} writes to value {root}, which may share the memory of value {lent}")
        for id in written:
            self._write(number, id)
            self._overwrite(number, id)

    def _call(self, number: int, step: Call) -> None:
        arguments = argument_values(step)
        if step.op in REGION_OPS:
            written, unread, aliased = set(), set(), set()
        else:
            op = resolve_op(step.op)
            written, unread, aliased = (f(op, step) for f in (written_arguments, out_arguments, aliased_arguments))
        passed_on: set[int] = set()
        if is_wait(step.op):  # what nothing has started is handed back as it is, what works in place in its operand's memory
            aliased = aliased | {id for id in arguments if id not in self._pending}
            passed_on = passed_on.union(*(self._borrowed.get(self._root(id), set()) for id in arguments))
        for id in dict.fromkeys(arguments):
            if id not in unread or self._storage(self._root(id)) in ("handle", "scalar"):
                self._need(number, id)
            self._touch(number, id, id in written)
        for id in sorted(written):
            self._write(number, id)
            self._overwrite(number, id)
        for id in step.outs:
            if id is None or id in written:
                continue
            root = self._root(id)
            if id in self._pending and (root in self._written or self._pending[id].step != number):
                self.problems.append(f"step {number} gives value {id} too, a result of {self._name(self._pending[id])}")
            self._write(number, id)
            if self._storage(id) == "handle":
                self._made[id] = number
                lenders = set(map(self._root, aliased)) | passed_on
                self._borrowed[id] = lenders.union(*(self._borrowed.get(r, set()) for r in lenders)) - {id}
            for owner in self._owners(id):
                self._access(owner, number, id, owner == root)  # what makes a view does not write to its base
        self._follow_collectives(number, written)

    def _follow_collectives(self, number: int, written: set[int]) -> None:
        """What a collective that starts or ends here means for what it was given."""
        for start in self._ending.get(number, ()):
            for id in start.operands:
                self._touch(number, id, False)
        start = self._starts.get(number)
        if start is None:
            return
        for id in start.results:
            if id not in written and self._storage(id) != "handle":
                self.problems.append(f"value {id}, a result of {self._name(start)}, has memory of its own in the plan")
        if start.wait is None:
            self.problems.append(f"nothing waits for {self._name(start)}")
        else:
            self._ending[start.wait].append(start)
        for id in start.operands:
            for owner in self._owners(id):
                self._in_use[owner].append((start, id in written, id if owner == self._root(id) else None))

    def _check_outputs(self) -> None:
        for out in self._plan.outputs:
            if out.kind != "value" or out.ref is None:
                continue
            root = self._root(out.ref)
            if root in self._pending:
                self.problems.append(f"output {out.ref} is a result of {self._name(self._pending[root])}, not yet complete")
            for owner in (root, *sorted(self._borrowed.get(root, ()))):
                if self._storage(owner) == "arena":
                    self.problems.append(
                        f"output {out.ref} lies in the arena (value {owner}), which the next call overwrites"
                    )
            empty = 0 in self._layout.specs[root].shape
            if not empty and not self._is_written(out.ref):
                self.problems.append(f"output {out.ref} is never written")

    # Order. The clock of a step says, per stream, up to which step of it everything has happened.

    def _make_clocks(self) -> list[dict[int, int]]:
        clocks: list[dict[int, int]] = []
        latest: dict[int, dict[int, int]] = {}
        self._streams = [s.stream if isinstance(s, Launch) else 0 for s in self._plan.steps]
        self.streams = len({0, *self._streams})
        for number, step in enumerate(self._plan.steps):
            stream = self._streams[number]
            clock = dict(latest.get(stream, {}))
            awaited = [clocks[w] for w in step.waits] if isinstance(step, Launch) else list(latest.values())
            for other in awaited:
                for s, done in other.items():
                    clock[s] = max(clock.get(s, -1), done)
            clock[stream] = number
            clocks.append(clock)
            latest[stream] = clock
        return clocks

    def before(self, first: int, second: int) -> bool:
        """Whether step `first` has certainly ended when step `second` begins."""
        return first < second and self._clocks[second].get(self._streams[first], -1) >= first

    def _check_races(self) -> None:
        for root, accesses in sorted(self.accesses.items()):
            for i, (number, writes) in enumerate(accesses):
                for earlier, wrote in accesses[:i]:
                    if earlier != number and (writes or wrote) and not self.before(earlier, number):
                        self.problems.append(
                            f"steps {earlier} and {number} touch value {root} on two streams without a wait"
                        )
