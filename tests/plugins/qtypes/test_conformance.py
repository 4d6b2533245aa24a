"""The conformance suite on every type with a device layout; ``-m gpu`` runs the headers on a card."""

from __future__ import annotations

from mortice.core.testing.qtype_suite import QTypeSuite
from mortice.plugins.qtypes import mortice_qtypes

for _type in mortice_qtypes():
    if _type.traits is not None:
        _name = f"Test{_type.qtype.name}"
        globals()[_name] = type(_name, (QTypeSuite,), {"type": _type})
