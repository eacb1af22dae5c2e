"""Cutting: straight-line tensor code of a function becomes blocks, calls of other user functions go to their cut forms.

What is tensor code is known from having run: the recorder notes where in the source each op came from (`seen.py`). An
expression is cut if some op came from it and all its parts are names, constants, attributes or tensor code themselves.

before:  h = torch.tanh(self.w(x) + self.u(h)); y = self.visit(tree.left, h * 2)
after:   h, t = block_1(self.w, x, self.u, h); y = visit(self, tree.left, t)
"""

from __future__ import annotations

import ast
import builtins
import copy
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .constants import SIZED
from .fork import Forker
from .ghosts import Ghosts
from .seen import Seen, is_code
from .source import Source, function_of, place_of

STRICT = (ast.Call, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Subscript, ast.Attribute, ast.Tuple, ast.List, ast.Dict,
          ast.Set, ast.Starred, ast.keyword, ast.Slice)  # fmt: skip


PHASE = "_plait_phase"  # what a program calls at the beginning of a phase
PHASES = 7


@dataclass(frozen=True)
class Cut:
    """A function that is one block: `tree` defines it, its parameters are what the block reads, its free names are bound to
    `fixed`: modules and parameters that attributes of known modules hold."""

    name: str
    tree: ast.FunctionDef
    line: int
    fixed: dict[str, Any]


Callee = Callable[[types.FunctionType, Any], str | None]  # the name of the cut form of a function, bound as said


class Cutter:
    """Cuts one function, of which the first parameter is bound to `bound` (None where it is not known)."""

    def __init__(
        self, source: Source, bound: Any, seen: Seen, callee: Callee, prefix: str, without: frozenset[str] = frozenset()
    ) -> None:
        self.source = source
        self.bound = bound
        self.seen = seen
        self.callee = callee
        self.prefix = prefix
        self.without = without
        self.cuts: list[Cut] = []
        self.count = 0
        self.code = source.function.__code__
        self.globals = source.globals
        arguments = source.tree.args
        first = [*arguments.posonlyargs, *arguments.args][:1]
        stored = {n.id for n in ast.walk(source.tree) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        self.own = {a.arg: bound for a in first if bound is not None and a.arg not in stored}
        self.known = {**source.known(), **self.own}
        self.holds: list[tuple[Any, str, Any]] = []  # (object, attribute, what it held)
        self.called: set[str] = set()  # names of cut forms
        self.waiting: set[str] = set()  # those that wait for values
        self.forks: set[str] = set()  # those that wait for values, and that nothing else can reach meanwhile
        self.constants: dict[str, Any] = {}  # functions that give the same for the same arguments, by new names
        self.marked: set[int] = set()  # statements that are tensor code
        self.always: frozenset[str] = frozenset()  # names that may be read at any time
        self.exits: list[tuple[frozenset[str], frozenset[str]]] = []  # for each loop: read after it, and by its next turn

    def run(self, *, phases: bool = False) -> ast.FunctionDef:
        """The function after cutting; its blocks are in `cuts`. With `phases` what follows a call of another function is a
        phase of its own: it runs once all instances have come so far, however deep they had to go."""
        tree = copy.deepcopy(self.source.tree)
        tree.body = self.body(tree.body)
        if phases and f"_{self.prefix}" not in self.called:  # an entry that reaches itself has no phases
            tree.body = list(self.with_phases(tree.body))
        self.always = frozenset(self.code.co_cellvars)  # what inner functions may read at any time
        tree.body, _ = self.joined(tree.body, self.always)
        if "ghosts" not in self.without:
            tree.body = Ghosts({c.name for c in self.cuts}, self.called).body(tree.body)
        if self.forks and "forks" not in self.without:
            tree.body = Forker(self.forks, {c.name for c in self.cuts}, self.fresh).body(tree.body)
        tree.returns = None
        return ast.fix_missing_locations(tree)

    def with_phases(self, statements: list[ast.stmt]) -> Iterator[ast.stmt]:
        """Statements of the program's entry, the beginnings of phases among them."""
        count, ended = 0, False
        for s in statements:
            if ended and count < PHASES and not (isinstance(s, ast.Return) and isinstance(s.value, ast.Name | None)):
                count += 1
                yield _at(ast.Expr(ast.Call(_load(PHASE), [ast.Constant(count)], [])), s)
                ended = False
            yield s
            ended = ended or any(isinstance(n, ast.Name) and n.id in self.called for n in ast.walk(s))

    # -- what is tensor code --------------------------------------------------------------------------------------------

    def is_tensor(self, node: ast.AST) -> bool:
        """Whether an expression is tensor code: ops came from it, and it can be computed from names alone."""
        stored = isinstance(getattr(node, "ctx", None), ast.Store | ast.Del)
        return not stored and self.is_pure(node) and any(self.is_site(n) for n in ast.walk(node))

    def is_site(self, node: ast.AST) -> bool:
        """Whether ops were seen to come from this very expression."""
        if not isinstance(
            node, ast.Call | ast.BinOp | ast.UnaryOp | ast.Compare | ast.Subscript | ast.Attribute | ast.AugAssign
        ):
            return False
        place = place_of(node)
        if self.seen.has_op(self.code, place):
            return True
        callees = self.seen.callees(self.code, place) if isinstance(node, ast.Call) else ()
        if not callees:
            return False
        callee = self.object(node.func) if isinstance(node, ast.Call) else None
        owner = getattr(callee, "__self__", callee)
        return all(self.seen.is_straight(c, of_module=isinstance(owner, nn.Module)) for c in callees)

    def is_pure(self, node: ast.AST) -> bool:
        """Whether an expression is tensor code, or reads names, constants and attributes only."""
        match node:
            case ast.Name() | ast.Constant() | ast.operator() | ast.unaryop() | ast.cmpop() | ast.expr_context():
                return True
            case ast.Call():
                return self.is_site(node) and all(self.is_pure(n) for n in ast.iter_child_nodes(node))
            case ast.Lambda() | ast.NamedExpr() | ast.Await() | ast.Yield() | ast.YieldFrom() | ast.JoinedStr():
                return False
            case ast.IfExp() | ast.BoolOp() | ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                return False
            case _ if isinstance(node, STRICT):
                return all(self.is_pure(n) for n in ast.iter_child_nodes(node))
        return False

    # -- statements -----------------------------------------------------------------------------------------------------

    def body(self, statements: Sequence[ast.stmt]) -> list[ast.stmt]:
        """A list of statements with its tensor code as statements of their own, which are marked."""
        found: list[tuple[bool, ast.stmt]] = []  # whether it is tensor code
        for statement in statements:
            self.statement(statement, found)
        self.marked |= {id(s) for tensor, s in found if tensor}
        return [s for _, s in found]

    def statement(self, s: ast.stmt, found: list[tuple[bool, ast.stmt]]) -> None:
        """Append what a statement becomes."""
        match s:
            case ast.Assign(targets=targets, value=value):
                value = self.lower(value, found)
                into = len(targets) == 1 and isinstance(targets[0], ast.Subscript) and self.is_site(targets[0])
                if into and self.is_pure(targets[0]) and self.is_pure(value):
                    found.append((True, ast.copy_location(ast.Assign(targets, value), s)))
                    return
                if self.is_tensor(value) and all(_names_only(t) for t in targets):
                    found.append((True, ast.copy_location(ast.Assign(targets, value), s)))
                    return
                s.value = self.named(value, found) if self.is_tensor(value) else value
                s.targets = [self.inline(t) for t in targets]
                found.append((False, s))
            case ast.AugAssign(target=ast.Name(), op=_, value=value):
                s.value = self.lower(value, found)
                tensor = self.is_site(s) and self.is_pure(s.value)
                found.append((tensor, s))
            case ast.AnnAssign(target=ast.Name(), value=value) if value is not None:
                self.statement(ast.copy_location(ast.Assign([s.target], value), s), found)
            case ast.Expr(value=value):
                value = self.lower(value, found)
                found.append((self.is_tensor(value), ast.copy_location(ast.Expr(value), s)))
            case ast.Return(value=value) if value is not None:
                value = self.lower(value, found)
                s.value = self.named(value, found) if self.is_tensor(value) else value
                found.append((False, s))
            case ast.If():
                s.test = self.lower(s.test, found)
                s.test = self.named(s.test, found) if self.is_tensor(s.test) else s.test
                s.body, s.orelse = self.body(s.body), self.body(s.orelse)
                found.append((False, s))
            case ast.While():
                s.test = self.inline(s.test)
                s.body, s.orelse = self.body(s.body), self.body(s.orelse)
                found.append((False, s))
            case ast.For():
                s.iter = self.lower(s.iter, found)
                s.iter = self.named(s.iter, found) if self.is_tensor(s.iter) else s.iter
                s.body, s.orelse = self.body(s.body), self.body(s.orelse)
                found.append((False, s))
            case ast.With():
                for item in s.items:
                    item.context_expr = self.inline(item.context_expr)
                s.body = self.body(s.body)
                found.append((False, s))
            case ast.Try():
                s.body, s.orelse, s.finalbody = self.body(s.body), self.body(s.orelse), self.body(s.finalbody)
                for handler in s.handlers:
                    handler.body = self.body(handler.body)
                found.append((False, s))
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                found.append((False, s))
            case _:
                found.append((False, self.inline(s)))

    # -- expressions ----------------------------------------------------------------------------------------------------

    def lower(self, node: Any, found: list[tuple[bool, ast.stmt]]) -> Any:
        """The expression with tensor code below it, and calls below tensor code, computed by statements before it."""
        if self.is_pure(node):
            return node
        if not isinstance(node, STRICT):
            return self.inline(node)
        children = list(_children(node))
        over_site = self.is_site(node)
        pending: list[tuple[Any, str, int | None]] = []  # calls that must stay before tensor code on their right
        for child, field, index in children:
            if field == "func" and isinstance(child, ast.Attribute | ast.Name):
                if isinstance(child, ast.Attribute):
                    child.value = self.lower(child.value, found)
                    if self.is_tensor(child.value):
                        child.value = self.named(child.value, found)
                continue
            made = self.lower(child, found)
            if self.is_tensor(made) and not over_site and not isinstance(made, ast.Starred | ast.keyword):
                self._name_pending(node, pending, found)
                made = self.named(made, found)
            elif not self.is_pure(made):
                if over_site and not isinstance(made, ast.Starred | ast.keyword):
                    made = self.named(made, found, tensor=False)
                else:
                    pending.append((made, field, index))
            _put(node, field, index, made)
        return self.resolved(node) if isinstance(node, ast.Call) and not self.is_pure(node) else node

    def _name_pending(self, node: Any, pending: list[tuple[Any, str, int | None]], found: Any) -> None:
        for made, field, index in pending:
            if not isinstance(made, ast.Starred | ast.keyword):
                _put(node, field, index, self.named(made, found, tensor=False))
        pending.clear()

    def named(self, value: ast.expr, found: list[tuple[bool, ast.stmt]], *, tensor: bool = True) -> ast.expr:
        """A name for a value that is computed by a statement of its own."""
        name = self.fresh("t")
        found.append((tensor, _at(ast.Assign([ast.Name(name, ast.Store())], value), value)))
        return _at(ast.Name(name, ast.Load()), value)

    def inline(self, node: Any) -> Any:
        """The syntax with each largest piece of tensor code in it as a block that is called in place."""
        return _Inline(self).visit(node)

    def resolved(self, call: ast.Call) -> ast.Call:
        """A call of a user function that is known beforehand, as a call of its cut form."""
        called = self.object(call.func)
        if isinstance(called, types.BuiltinFunctionType) and called in SIZED and isinstance(call.func, ast.Attribute):
            self.holds.append((self.object(call.func.value), call.func.attr, called))
            self.constants[name := self.fresh("constant")] = called
            call.func = _at(ast.Name(name, ast.Load()), call)
            return call
        found = function_of(called)
        if found is None:
            return call
        function, bound = found
        name = self.callee(function, bound)
        if name is None:
            return call
        self.called.add(name)
        if function.__code__ in self.seen.demands:
            self.waiting.add(name)
            if self.seen.is_separate(function.__code__, of_module=isinstance(bound, nn.Module)):
                self.forks.add(name)
        func = call.func
        if bound is not None:
            receiver = func if isinstance(self.object(func), nn.Module) else func.value  # type: ignore[attr-defined]
            call.args = [receiver, *call.args]
        call.func = _at(ast.Name(name, ast.Load()), call)
        return call

    def object(self, node: ast.expr) -> Any:
        """What a name, or a chain of attributes that begins with a known object, stands for; None where unknown."""
        if isinstance(node, ast.Name):
            if node.id in self.known:
                return self.known[node.id]
            return None if node.id in self.source.locals else self.globals.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.object(node.value)
            if isinstance(base, nn.Module | types.ModuleType):
                return getattr(base, node.attr, None)
        return None

    def held(self, node: ast.expr) -> Any:
        """The module or parameter that an attribute of a known module holds; None for anything else. Whoever relies on it
        looks again before each call of the batch (`Front.entry`)."""
        found = self.object(node) if isinstance(node, ast.Attribute) else None
        if not isinstance(found, nn.Module | nn.Parameter):
            return None
        assert isinstance(node, ast.Attribute)
        self.holds.append((self.object(node.value), node.attr, found))
        return found

    # -- blocks ---------------------------------------------------------------------------------------------------------

    def fresh(self, kind: str) -> str:
        """A name that the function does not use."""
        self.count += 1
        return f"_{self.prefix}_{kind}{self.count}"

    def joined(self, statements: Sequence[ast.stmt], live: frozenset[str]) -> tuple[list[ast.stmt], frozenset[str]]:
        """The statements with runs of tensor code as blocks, and the names that are read from their beginning on; `live` are
        those that are read after them."""
        done: list[ast.stmt] = []
        run: list[ast.stmt] = []
        for s in reversed(statements):
            if id(s) in self.marked:
                run.insert(0, s)
                continue
            if run:
                made, live = self.block(run, live)
                done.insert(0, made)
                run = []
            live = self.inside(s, live)
            done.insert(0, s)
        if run:
            made, live = self.block(run, live)
            done.insert(0, made)
        return done, live

    def inside(self, s: ast.stmt, live: frozenset[str]) -> frozenset[str]:
        """Join the bodies of a statement; the names that are read from it on."""
        before = self.flow([s], live)
        match s:
            case ast.If():
                s.body, _ = self.joined(s.body, live)
                s.orelse, _ = self.joined(s.orelse, live)
            case ast.For() | ast.While():
                turn = self.turn(s, live)
                self.exits.append((live, turn))
                s.body, _ = self.joined(s.body, turn)
                self.exits.pop()
                s.orelse, _ = self.joined(s.orelse, live)
            case ast.With():
                s.body, _ = self.joined(s.body, live)
            case ast.Try():
                kept, self.always = self.always, self.always | self.caught(s, live)
                s.body, _ = self.joined(s.body, live)
                for handler in s.handlers:
                    handler.body, _ = self.joined(handler.body, live)
                s.orelse, _ = self.joined(s.orelse, live)
                self.always = kept
                s.finalbody, _ = self.joined(s.finalbody, live)
        return before

    def flow(self, statements: Sequence[ast.stmt], live: frozenset[str]) -> frozenset[str]:
        """The names that are read from some statements on, where `live` are those that are read after them."""
        for s in reversed(statements):
            match s:
                case ast.If():
                    live = self.flow(s.body, live) | self.flow(s.orelse, live) | _loads(s.test)
                case ast.For():
                    live = (self.turn(s, live) - frozenset(_stored(s.target))) | _loads(s.iter) | self.flow(s.orelse, live)
                case ast.While():
                    live = self.turn(s, live) | self.flow(s.orelse, live)
                case ast.With():
                    live = self.flow(s.body, live).union(*(_loads(item) for item in s.items))
                case ast.Try():
                    live = live | self.caught(s, live)
                case ast.Return() | ast.Raise():
                    live = _loads(s)
                case ast.Break():
                    live = self.exits[-1][0]
                case ast.Continue():
                    live = self.exits[-1][1]
                case ast.Assign():
                    live = (live - frozenset(n for t in s.targets if _names_only(t) for n in _stored(t))) | _loads(s)
                case _:
                    live = live | _loads(s)
            live = live | self.always
        return live

    def turn(self, s: ast.For | ast.While, live: frozenset[str]) -> frozenset[str]:
        """The names that are read at the end of a loop's body: by its next turn, or after it."""
        found = live | (_loads(s.test) if isinstance(s, ast.While) else frozenset())
        while True:
            self.exits.append((live, found))
            more = found | (self.flow(s.body, found) - frozenset(_stored(s.target) if isinstance(s, ast.For) else ()))
            self.exits.pop()
            if more == found:
                return found
            found = more

    def caught(self, s: ast.Try, live: frozenset[str]) -> frozenset[str]:
        """The names that may be read once something in a `try` has raised, and all that it reads itself."""
        return live | _loads(s)

    def block(self, statements: list[ast.stmt], live: frozenset[str]) -> tuple[ast.stmt, frozenset[str]]:
        """One statement that runs a block, and the names that are read from it on."""
        reader = _Reader(self)
        body = [reader.statement(copy.deepcopy(s)) for s in statements]
        names = list(dict.fromkeys(n for s in statements for n in _stored(s)))
        outputs = [n for n in names if n in live]
        call = self.cut(reader, body, [_load(n) for n in outputs], statements[0])
        before = (live - frozenset(names)).union(self.always, reader.inputs, *(_loads(v) for v in reader.arguments))
        if not outputs:
            return _at(ast.Expr(call), statements[0]), before
        target = (
            ast.Name(outputs[0], ast.Store()) if len(outputs) == 1 else _tuple([ast.Name(n, ast.Store()) for n in outputs])
        )
        return _at(ast.Assign([target], call), statements[0]), before

    def cut(self, reader: _Reader, body: list[ast.stmt], outputs: list[ast.expr], at: ast.AST) -> ast.Call:
        """Make a block; the call of it."""
        name = self.fresh("block")
        result = outputs[0] if len(outputs) == 1 else _tuple(outputs, ast.Load())
        parameters = [ast.arg(n) for n in reader.parameters]
        tree = ast.FunctionDef(
            name=name,
            args=ast.arguments(posonlyargs=[], args=parameters, kwonlyargs=[], kw_defaults=[], defaults=[]),
            body=[*body, _at(ast.Return(result), at)],
            decorator_list=[],
        )
        self.cuts.append(Cut(name, ast.fix_missing_locations(_at(tree, at)), at.lineno, reader.fixed))  # type: ignore[attr-defined]
        arguments = [_at(copy.deepcopy(v), at) for v in reader.arguments]
        return _at(ast.Call(_load(name), arguments, []), at)


class _Reader(ast.NodeTransformer):
    """Turns what a block reads from around it into parameters: local names, and attributes of known modules."""

    def __init__(self, cutter: Cutter) -> None:
        self.cutter = cutter
        self.parameters: list[str] = []
        self.arguments: list[ast.expr] = []
        self.inputs: set[str] = set()
        self.defined: set[str] = set()
        self.given: dict[str, str] = {}
        self.fixed: dict[str, Any] = {}

    def statement(self, s: ast.stmt) -> ast.stmt:
        """Rewrite one statement, in order."""
        if isinstance(s, ast.Assign):
            s.value = self.visit(s.value)
            if isinstance(s.targets[0], ast.Subscript):  # an element of a tensor
                target = s.targets[0]
                target.value, target.slice = self.visit(target.value), self.visit(target.slice)
        elif isinstance(s, ast.AugAssign):
            s.value = self.visit(s.value)
            assert isinstance(s.target, ast.Name)
            if s.target.id not in self.defined:
                self.parameter(s.target.id, _load(s.target.id))
                self.inputs.add(s.target.id)
        elif isinstance(s, ast.Expr):
            s.value = self.visit(s.value)
        self.defined |= set(_stored(s))
        return s

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.defined or not self.is_local(node.id):
            return node
        self.inputs.add(node.id)
        return self.parameter(node.id, node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Attribute) and self.cutter.object(node.func) is None:
            node.func.value = self.visit(node.func.value)  # the method of a tensor stays one
        else:
            node.func = self.visit(node.func)
        node.args = [self.visit(a) for a in node.args]
        node.keywords = [self.visit(k) for k in node.keywords]
        return node

    def visit(self, node: ast.AST) -> Any:
        host = isinstance(node, ast.Attribute | ast.Subscript | ast.BinOp | ast.UnaryOp | ast.Compare)
        if not host or any(self.cutter.is_site(n) for n in ast.walk(node)):
            return super().visit(node)
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        held = self.cutter.object(node) if isinstance(node, ast.Attribute) else None  # torch.pi, or a number in a file
        if names & self.defined or not (any(self.is_local(n) for n in names) or (held is not None and not is_code(held))):
            return super().visit(node)
        return self.parameter(ast.unparse(node), node)

    def is_local(self, name: str) -> bool:
        """Whether a name may stand for something else at another time: it is no function, class or module of the file's."""
        if name in self.cutter.source.locals or name.startswith(f"_{self.cutter.prefix}_"):
            return True
        found = self.cutter.globals.get(name, getattr(builtins, name, None))
        return found is None or not is_code(found)

    def parameter(self, text: str, value: ast.expr) -> ast.Name:
        """The parameter that stands for an expression."""
        if text not in self.given:
            name = text if text.isidentifier() else self.cutter.fresh("p")
            self.given[text] = name
            held = self.cutter.held(value)
            if held is not None:
                self.fixed[name] = held
            else:
                self.parameters.append(name)
                self.arguments.append(value)
        return ast.copy_location(_load(self.given[text]), value)


class _Inline(ast.NodeTransformer):
    """Calls a block in place for each largest piece of tensor code."""

    def __init__(self, cutter: Cutter) -> None:
        self.cutter = cutter

    def visit(self, node: ast.AST) -> Any:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            return node
        if isinstance(node, ast.expr) and not isinstance(node, ast.Starred) and self.cutter.is_tensor(node):
            reader = _Reader(self.cutter)
            value = reader.visit(copy.deepcopy(node))
            return self.cutter.cut(reader, [], [value], node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # a method is no value of its own
            node.func.value = self.visit(node.func.value)
            node.args = [self.visit(a) for a in node.args]
            node.keywords = [self.visit(k) for k in node.keywords]
            return self.cutter.resolved(node)
        made = super().generic_visit(node)
        return self.cutter.resolved(made) if isinstance(made, ast.Call) else made


def _children(node: Any) -> Iterator[tuple[Any, str, int | None]]:
    for field, value in ast.iter_fields(node):
        if isinstance(value, list):
            for index, child in enumerate(value):
                if isinstance(child, ast.expr | ast.keyword):
                    yield child, field, index
        elif isinstance(value, ast.expr):
            yield value, field, None


def _put(node: Any, field: str, index: int | None, value: Any) -> None:
    if index is None:
        setattr(node, field, value)
    else:
        getattr(node, field)[index] = value


def _names_only(target: ast.expr) -> bool:
    if isinstance(target, ast.Tuple | ast.List):
        return all(_names_only(t) for t in target.elts)
    return isinstance(target, ast.Name)


def _stored(s: ast.AST) -> list[str]:
    return [n.id for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]


def _loads(s: ast.AST) -> frozenset[str]:
    """Names that are read anywhere in a statement, or written by adding to them."""
    found = {n.id for n in ast.walk(s) if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Store)}
    return frozenset(
        found | {n.target.id for n in ast.walk(s) if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)}
    )


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _tuple(elements: list[Any], ctx: ast.expr_context | None = None) -> ast.Tuple:
    return ast.Tuple(elements, ctx or ast.Store())


def _at(node: Any, where: ast.AST) -> Any:
    return ast.fix_missing_locations(ast.copy_location(node, where))
