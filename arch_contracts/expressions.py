"""Arithmetic over hyperparameters, as contracts write it: ``"num_heads * head_dim"``, ``"4096 if layer % 2 else 0"``.

The text is parsed once into Python's own syntax tree and then walked by the few rules below; it is never compiled or
evaluated as Python. What is allowed: numbers, names, ``+ - * / // % **``, comparisons, ``and or not``,
``a if test else b`` and the functions of `FUNCTIONS`. Anything else is refused when the contract is read.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

from attrs import field, frozen

__all__ = ["FUNCTIONS", "MAX_VALUE", "Expression", "ExpressionError", "Number"]

Number = int | float

# A contract is data; nothing sensible is longer, and the bound keeps the parser's recursion small.
_MAX_LENGTH = 200
MAX_VALUE = 1e30
"""No value of a model comes near it, and it keeps integers from growing without end (``10 ** 10 ** 10``)."""
_CHARACTERS = re.compile(r"[A-Za-z0-9_ .,+\-*/%()<>=!]*")

FUNCTIONS: Mapping[str, Callable[..., Number]] = {
    "sqrt": math.sqrt,
    "log": math.log,
    "floor": math.floor,
    "ceil": math.ceil,
    "min": min,
    "max": max,
}


class ExpressionError(ValueError):
    """An expression that cannot be parsed or has no value."""


def _bounded(value: Number) -> Number:
    if not abs(value) <= MAX_VALUE:  # NaN fails this too
        raise ExpressionError(f"a value beyond {MAX_VALUE:g}")
    return value


def _power(base: Number, exponent: Number) -> Number:
    if base and exponent * math.log(abs(base)) > math.log(MAX_VALUE):
        raise ExpressionError(f"{base} ** {exponent} is beyond {MAX_VALUE:g}")
    value: Any = base**exponent
    if isinstance(value, complex):
        raise ExpressionError(f"{base} ** {exponent} is not a real number")
    number: Number = value
    return number


_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ALLOWED = (
    ast.Expression,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.BinOp,
    ast.UnaryOp,
    ast.USub,
    ast.Not,
    ast.BoolOp,
    ast.And,
    ast.Or,
    ast.Compare,
    ast.IfExp,
    ast.Call,
    *_BINARY,
    *_COMPARE,
)


@frozen
class Expression:
    """A parsed expression; `names` are the hyperparameters it reads.

    Raises:
        ExpressionError: when the text is not of the grammar.

    """

    text: str
    names: frozenset[str] = field(init=False, eq=False)
    _tree: ast.expr = field(init=False, eq=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if len(self.text) > _MAX_LENGTH:
            raise ExpressionError(f"an expression of {len(self.text)} characters; at most {_MAX_LENGTH} are read")
        if not _CHARACTERS.fullmatch(self.text):
            raise ExpressionError(f"{self.text!r}: a character that has no place in a contract's expression")
        try:
            tree = ast.parse(self.text.strip(), mode="eval")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise ExpressionError(f"{self.text!r} is not an expression: {reason}") from None
        called = set()
        for node in ast.walk(tree):
            self._check(node)
            if isinstance(node, ast.Call):
                called.add(node.func)
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and node not in called}
        object.__setattr__(self, "names", frozenset(names))
        object.__setattr__(self, "_tree", tree.body)

    def _check(self, node: ast.AST) -> None:
        if not isinstance(node, _ALLOWED):
            raise ExpressionError(f"{self.text!r}: {type(node).__name__} has no place in a contract's expression")
        if isinstance(node, ast.Constant) and type(node.value) not in (int, float):
            raise ExpressionError(f"{self.text!r}: {node.value!r} is not a number")
        if isinstance(node, ast.Call) and (
            not isinstance(node.func, ast.Name) or node.func.id not in FUNCTIONS or node.keywords
        ):
            raise ExpressionError(f"{self.text!r}: only these functions exist: {', '.join(FUNCTIONS)}")

    @property
    def is_zero(self) -> bool:
        """Whether it is the number 0 whatever the hyperparameters."""
        return isinstance(self._tree, ast.Constant) and self._tree.value == 0

    def evaluate(self, values: Mapping[str, Number]) -> Number:
        """The value for `values`, which must hold every name in `names`; finite.

        Raises:
            ExpressionError: for a missing name, a division by zero, a value out of bounds or without a real number.

        """
        try:
            return _value(self._tree, values)
        except KeyError as error:
            raise ExpressionError(f"{self.text!r}: no hyperparameter {error.args[0]!r}") from None
        except (ArithmeticError, ValueError, TypeError) as error:
            raise ExpressionError(f"{self.text!r}: {error}") from None


def _value(node: ast.expr, values: Mapping[str, Number]) -> Number:
    match node:
        case ast.Constant(value=int() | float() as number):
            return _bounded(number)
        case ast.Name(id=name):
            return _bounded(values[name])
        case ast.BinOp(left=left, op=op, right=right):
            return _bounded(_BINARY[type(op)](_value(left, values), _value(right, values)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, values)
        case ast.UnaryOp(operand=operand):
            return not _value(operand, values)
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(part, values) for part in parts)
        case ast.BoolOp(values=parts):
            return any(_value(part, values) for part in parts)
        case ast.Compare(left=left, ops=ops, comparators=rights):
            numbers = [_value(left, values), *(_value(right, values) for right in rights)]
            return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, numbers, numbers[1:], strict=False))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, values) else orelse, values)
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return FUNCTIONS[name](*(_value(argument, values) for argument in arguments))
    raise AssertionError(f"unchecked node {node!r}")
