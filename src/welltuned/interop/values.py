"""What an expression in a script is worth, where that can be known without running it.

Constants, simple arithmetic, names that have one value in the whole file, lists and dicts of these, and attributes of
small classes of constants. Everything else is Unreadable: a name that is also a parameter, a loop variable or set
twice to different values, a call, a value from the command line.
"""

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

_DTYPES = frozenset({"float16", "bfloat16", "float32", "float64", "half", "uint8"})
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_CONVERSIONS: Mapping[str, Callable[[Any], Any]] = {"float": float, "int": int, "str": str, "bool": bool}
_STEPS = 8  # of names and functions that are followed to a call
_LARGEST = 1e15  # beyond it arithmetic is no hyperparameter, and `9**9**9` would never end


class Unreadable(Exception):
    """The expression's value is known only when it runs."""


class Names:
    """Every name of a script with all that is ever assigned to it, in whatever scope."""

    def __init__(self, tree: ast.Module):
        self.assigned: dict[str, list[ast.expr]] = {}
        self.attributes: dict[tuple[str, str], list[ast.expr]] = {}
        self.classes: dict[str, dict[str, ast.expr]] = {}
        self.opaque: set[str] = set()
        self.imported: dict[str, str] = {}
        self.returned: dict[str, list[ast.expr]] = {}
        self._busy: set[str] = set()
        self._collect(tree.body, certain=True)
        for node in ast.walk(tree):
            self._note(node)

    def _collect(self, body: list[ast.stmt], certain: bool) -> None:
        """Assignments; one that stands under a condition makes its name opaque."""
        for statement in body:
            match statement:
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        self._bind(target, value, certain)
                case ast.AnnAssign(target=target, value=ast.expr() as value):
                    self._bind(target, value, certain)
                case ast.If(test=test, body=inner, orelse=rest):
                    main = "__main__" in ast.dump(test)
                    self._collect(inner, certain and main)
                    self._collect(rest, False)
                case ast.FunctionDef(body=inner) | ast.AsyncFunctionDef(body=inner) | ast.With(body=inner):
                    self._collect(inner, certain)
                case ast.For(body=inner, orelse=rest) | ast.While(body=inner, orelse=rest):
                    self._collect([*inner, *rest], False)
                case ast.Try(body=inner, handlers=handlers, orelse=rest, finalbody=last):
                    self._collect(inner, certain)
                    self._collect([*(s for h in handlers for s in h.body), *rest, *last], False)
                case ast.ClassDef(name=name, body=inner):
                    self.classes[name] = _constants_of(inner)

    def _bind(self, target: ast.expr, value: ast.expr, certain: bool) -> None:
        match target:
            case ast.Name(id=name):
                self.assigned.setdefault(name, []).append(value)
                if not certain:
                    self.opaque.add(name)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                self.attributes.setdefault((name, attribute), []).append(
                    value if certain else ast.Name("?", ast.Load())
                )
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                values = value.elts if isinstance(value, ast.Tuple | ast.List) else []
                if len(values) == len(targets):
                    for inner, one in zip(targets, values, strict=True):
                        self._bind(inner, one, certain)
                else:
                    self.opaque |= {inner.id for inner in targets if isinstance(inner, ast.Name)}

    def _note(self, node: ast.AST) -> None:
        match node:
            case ast.arg(arg=name) | ast.NamedExpr(target=ast.Name(id=name)) | ast.AugAssign(target=ast.Name(id=name)):
                self.opaque.add(name)
            case (
                ast.For(target=target)
                | ast.comprehension(target=target)
                | ast.withitem(optional_vars=ast.expr() as target)
            ):
                self.opaque |= {inner.id for inner in ast.walk(target) if isinstance(inner, ast.Name)}
            case ast.FunctionDef(name=name):
                returns = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return) and inner.value]
                self.returned.setdefault(name, []).extend(returns)
            case ast.ImportFrom(names=names):
                self.imported |= {name.asname: name.name for name in names if name.asname}

    def called(self, call: ast.Call) -> str:
        """The last part of a called name, with `import ... as` undone: SFTConfig, from_pretrained."""
        match call.func:
            case ast.Name(id=name):
                return self.imported.get(name, name)
            case ast.Attribute(attr=name):
                return name
        return ""

    # ── values ──

    def value(self, node: ast.expr) -> Any:
        """The value of an expression; raises Unreadable."""
        try:
            return self._value(node)
        except (TypeError, ValueError, ArithmeticError, KeyError, IndexError, RecursionError) as error:
            raise Unreadable from error

    def _value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return self._name(name)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self._value(operand)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return +self._value(operand)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return not self._value(operand)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return _computed(type(op), self._value(left), self._value(right))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._value(body if self._value(test) else orelse)
            case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
                return [self._value(item) for item in items]
            case ast.Dict(keys=keys, values=values):
                return self._dict(keys, values)
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                return self._attribute(name, attribute)
            case ast.Subscript(value=container, slice=key):
                return self._value(container)[self._value(key)]
            case ast.Call() if self.called(node) in _CONVERSIONS and len(node.args) == 1 and not node.keywords:
                return _CONVERSIONS[self.called(node)](self._value(node.args[0]))
            case ast.Call(func=ast.Name(id="dict"), args=[], keywords=keywords):
                return {word.arg: self._value(word.value) for word in keywords if word.arg}
        raise Unreadable

    def _dict(self, keys: list[ast.expr | None], values: list[ast.expr]) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in zip(keys, values, strict=True):
            found |= self._value(value) if key is None else {self._value(key): self._value(value)}
        return found

    def _name(self, name: str) -> Any:
        if name in self.opaque or name in self._busy or name not in self.assigned:
            raise Unreadable
        self._busy.add(name)
        try:
            return _agreed([self._value(node) for node in self.assigned[name]])
        finally:
            self._busy.discard(name)

    def _attribute(self, name: str, attribute: str) -> Any:
        """torch.bfloat16, or a field of a class of constants: `Args.lr`, `args.lr` after `args = Args()`."""
        if name == "torch" and attribute in _DTYPES:
            return attribute
        if (name, attribute) in self.attributes:
            return _agreed([self._value(node) for node in self.attributes[name, attribute]])
        fields = self.classes.get(name)
        if fields is None and name not in self.opaque and len(self.assigned.get(name, [])) == 1:
            made = self.assigned[name][0]
            if isinstance(made, ast.Call) and self.called(made) in self.classes and not made.args:
                given = {word.arg: word.value for word in made.keywords if word.arg}
                fields = self.classes[self.called(made)] | given
        if fields is None or attribute not in fields:
            raise Unreadable
        return self._value(fields[attribute])

    def call_of(self, node: ast.expr) -> ast.Call | None:
        """The call that an expression is, that the only assignment of its name is, or that its function returns."""
        for _ in range(_STEPS):
            if isinstance(node, ast.Name) and len(self.assigned.get(node.id, [])) == 1:
                node = self.assigned[node.id][0]
            elif isinstance(node, ast.Call) and len(self.returned.get(self.called(node), [])) == 1:
                node = self.returned[self.called(node)][0]
            else:
                break
        return node if isinstance(node, ast.Call) else None


def _constants_of(body: list[ast.stmt]) -> dict[str, ast.expr]:
    found: dict[str, ast.expr] = {}
    for statement in body:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                found[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.Call() as call):
                found[name] = next((word.value for word in call.keywords if word.arg == "default"), call)
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                found[name] = value
    return found


def _agreed(values: list[Any]) -> Any:
    if any(value != values[0] or type(value) is not type(values[0]) for value in values[1:]):
        raise Unreadable
    return values[0]


def _computed(op: type[ast.operator], left: Any, right: Any) -> Any:
    numbers = isinstance(left, int | float) and isinstance(right, int | float)
    if numbers and op is ast.Pow and (abs(right) > 64 or abs(left) > 1e6):
        raise Unreadable
    if not numbers and not (op is ast.Add and type(left) is type(right)):
        raise Unreadable
    value = _BINARY[op](left, right)
    if numbers and (isinstance(value, complex) or not math.isfinite(value) or abs(value) > _LARGEST):
        raise Unreadable
    return value
