"""Tells which groups of a program are lowered alike: layers repeat, and one of each kind shows what is compiled.

What decides a group's kernels is its operators, the types and shapes of their weights, and what its neighbours are;
names, layers and addresses decide only what a launch is given.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

from attrs import define, field, fields

from mortice.core.model.operators import Buffer, Operator, WeightRef
from mortice.plugins.executors.cuda.lowering.fusion import Group

__all__ = ["Likeness"]

_PLAIN = frozenset({int, float, str, bool, type(None)})

_PLACES = frozenset({"name", "layer"})
"""Attributes of an operator that say where it stands, not what it does."""


@define(eq=False, repr=False)
class Likeness:
    """Compares groups of one program, and remembers what it saw.

    Attributes:
        qtype: the type of a weight.

    """

    qtype: Callable[[WeightRef], str]
    _forms: dict[int, tuple[Group, int, tuple[str, ...]]] = field(factory=dict, init=False)
    """By a group's id: the group, kept so that no other takes its place; the number of its form; its buffers."""
    _numbers: dict[Hashable, int] = field(factory=dict, init=False)
    _names: dict[type, tuple[str, ...]] = field(factory=dict, init=False)

    def first_of_each(self, neighbourhoods: Iterable[Sequence[Group | None]]) -> Iterator[int]:
        """Of neighbourhoods that are alike the number of the first; each is a group with all it is lowered with."""
        seen: set[Hashable] = set()
        for number, groups in enumerate(neighbourhoods):
            key = self._key(groups)
            if key not in seen:
                seen.add(key)
                yield number

    def _key(self, groups: Sequence[Group | None]) -> Hashable:
        """The forms of groups, and which of their buffers are the same."""
        forms: list[int] = []
        order: dict[str, int] = {}
        wiring: list[int] = []
        for group in groups:
            if group is None:
                forms.append(-1)
                continue
            _, form, buffers = self._forms.get(id(group)) or self._look(group)
            forms.append(form)
            wiring += [order.setdefault(name, len(order)) for name in buffers]
        return tuple(forms), tuple(wiring)

    def _look(self, group: Group) -> tuple[Group, int, tuple[str, ...]]:
        buffers: list[str] = []
        form = type(group), *(self._form(getattr(group, name), buffers) for name in self._counting(type(group)))
        number = self._numbers.setdefault(form, len(self._numbers))
        self._forms[id(group)] = seen = group, number, tuple(buffers)
        return seen

    def _form(self, value: Any, buffers: list[str]) -> Hashable:
        """A value without names and places; the buffers in it are added to `buffers`."""
        if type(value) in _PLAIN:  # most values
            plain: Hashable = value
            return plain
        if isinstance(value, Buffer):
            buffers.append(value.name)
            return value.width
        if isinstance(value, WeightRef):
            return self.qtype(value), value.shape, value.row_start, value.row_stop
        if isinstance(value, Operator):
            return type(value), *(self._form(getattr(value, name), buffers) for name in self._counting(type(value)))
        if isinstance(value, tuple):
            return tuple(self._form(item, buffers) for item in value)
        known: Hashable = value
        return known

    def _counting(self, kind: type) -> tuple[str, ...]:
        """The attributes of a group or an operator that count."""
        names = self._names.get(kind)
        if names is None:
            names = self._names[kind] = tuple(item.name for item in fields(kind) if item.name not in _PLACES)
        return names
