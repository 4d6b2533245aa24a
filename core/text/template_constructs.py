"""What in a chat template looks as if it were not there for chatting, found in its syntax tree, with the line.

Runs in the process that renders templates (`template_worker`), for parsing what a stranger wrote can take long, too.
A finding is a reason to read the line, no proof of malice: templates of published models have none of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["suspicious_constructs"]

_INTERNALS = frozenset(
    {"mro", "func_globals", "func_code", "gi_frame", "gi_code", "cr_frame", "f_globals", "f_builtins", "tb_frame"}
)
_HELPERS = frozenset({"config", "cycler", "get_flashed_messages", "joiner", "lipsum", "request", "self", "url_for"})
"""Names through which code is reached in other uses of Jinja2; no chat needs them."""
_SEARCHES = frozenset({"count", "endswith", "find", "index", "startswith"})
_MOST_ROUNDS = 100_000
_URL = re.compile(r"\b(?:https?|ftp|file|data):/{0,2}[^\s'\"]+")
_WORDS = re.compile(r"\w[\w .,;!?'’-]{2,}")
_ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{200,}")
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufeff\uffa0"
    "\U000e0000-\U000e0fff]"
)


def suspicious_constructs(tree: Any, source: str) -> list[tuple[int, str]]:
    """Line and reason of each, in order of lines, each once.

    Args:
        tree: what Jinja2 parsed the template into.
        source: its text.

    """
    found = {*_in_tree(tree), *_in_text(source)}
    return sorted(found)


def _in_text(source: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(source.splitlines(), 1):
        for character in sorted({match[0] for match in _INVISIBLE.finditer(line)}):
            yield number, f"the invisible character U+{ord(character):04X}"
        if _ENCODED.search(line):
            yield number, "a long text that looks encoded"


def _in_tree(tree: Any) -> Iterator[tuple[int, str]]:
    from jinja2 import nodes

    own = {node.name for node in tree.find_all(nodes.Name) if node.ctx in ("store", "param")}
    loads = (nodes.Import, nodes.FromImport, nodes.Include, nodes.Extends)
    for node in tree.find_all(nodes.Node):
        if isinstance(node, loads):
            yield node.lineno, f"{type(node).__name__.lower()} of another template"
        elif isinstance(node, nodes.Name) and node.name in _HELPERS - own:
            yield node.lineno, f"the name {node.name!r}, through which code can be reached"
        elif isinstance(node, nodes.Filter) and node.name == "attr":
            yield node.lineno, "the filter 'attr', which reaches attributes by a name that is made up on the way"
        elif isinstance(node, nodes.If) and _calls(node.test, "strftime_now"):
            yield node.lineno, "a branch that depends on the date"
        else:
            yield from _expression(node)


def _expression(node: Any) -> Iterator[tuple[int, str]]:
    from jinja2 import nodes

    attribute = _attribute(node)
    if attribute is not None and (attribute.startswith("__") or attribute in _INTERNALS):
        yield node.lineno, f"the attribute {attribute!r}"
    elif isinstance(node, (nodes.TemplateData, nodes.Const)):
        text = node.data if isinstance(node, nodes.TemplateData) else node.value
        for match in _URL.finditer(text) if isinstance(text, str) else ():
            yield node.lineno + text.count("\n", 0, match.start()), f"the address {match[0][:80]!r}"
    elif isinstance(node, nodes.Call):
        yield from _call(node)
    elif isinstance(node, nodes.Mul):
        sides = [side.value for side in (node.left, node.right) if isinstance(side, nodes.Const)]
        if any(isinstance(side, int) and side > _MOST_ROUNDS for side in sides):
            yield node.lineno, f"a product with a number above {_MOST_ROUNDS}"
    elif isinstance(node, nodes.Compare):
        sides = [node.expr, *(operand.expr for operand in node.ops)]
        words = [side.value for side in sides if _is_words(side)]
        if words and any(_is_content(side) for side in sides):
            yield node.lineno, f"a test whether a message says {words[0][:80]!r}"


def _call(node: Any) -> Iterator[tuple[int, str]]:
    from jinja2 import nodes

    called = node.node
    if isinstance(called, nodes.Name) and called.name == "range":
        counts = [argument.value for argument in node.args if isinstance(argument, nodes.Const)]
        if any(isinstance(count, int) and count > _MOST_ROUNDS for count in counts):
            yield node.lineno, f"a loop of more than {_MOST_ROUNDS} rounds"
    if isinstance(called, nodes.Getattr) and called.attr in _SEARCHES and _is_content(called.node):
        words = [argument.value for argument in node.args if _is_words(argument)]
        if words:
            yield node.lineno, f"a test whether a message says {words[0][:80]!r}"


def _attribute(node: Any) -> str | None:
    """The attribute an expression reaches for, whichever way it is written."""
    from jinja2 import nodes

    if isinstance(node, nodes.Getattr):
        return str(node.attr)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        return node.arg.value
    return None


def _is_words(node: Any) -> bool:
    """Whether it is a literal made of words; what marks a turn or a tool call has other signs."""
    from jinja2 import nodes

    return isinstance(node, nodes.Const) and isinstance(node.value, str) and bool(_WORDS.fullmatch(node.value))


def _is_content(node: Any) -> bool:
    """Whether it is what a message says, filters and methods on it included."""
    from jinja2 import nodes

    if isinstance(node, nodes.Filter):
        return node.node is not None and _is_content(node.node)
    if isinstance(node, nodes.Call):
        return isinstance(node.node, nodes.Getattr) and _is_content(node.node.node)
    return _attribute(node) == "content" or (isinstance(node, nodes.Name) and node.name == "content")


def _calls(node: Any, name: str) -> bool:
    from jinja2 import nodes

    calls = [node] if isinstance(node, nodes.Call) else []
    return any(
        isinstance(call.node, nodes.Name) and call.node.name == name for call in [*calls, *node.find_all(nodes.Call)]
    )
