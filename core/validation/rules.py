"""Every rule that a finding may name: what it says, and the step of validation it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from types import MappingProxyType

__all__ = ["RULES", "STEPS", "describe_rule", "step_of"]

RULES: Mapping[str, str] = MappingProxyType(
    {
        "file.refused": "The file cannot be opened: it is broken, cut short, or no loader takes it.",
        "file.architecture": "No contract serves the file's general.architecture.",
        "plugin.failed": "A plugin failed while the file was validated.",
        "hyperparameter.*": "A number that the contract reads is missing, of the wrong type or out of range.",
        "key.unread": "A metadata key of the architecture that the contract does not read.",
        "rope.scaling": "The file asks for a context extension that is incomplete or that the contract does not allow.",
        "contract.architecture": "The contract that was asked for was not made for the file's general.architecture.",
        "contract.expression": "An expression of the contract has no usable value for this file.",
        "*.range": "A number of the contract is out of its range for this file.",
        "role.missing": "A weight that the contract requires is missing.",
        "role.forbidden": "A weight that the contract forbids is there.",
        "role.shape": "A weight has another shape than the contract says.",
        "role.type": "A weight has a type that holds no weights.",
        "role.split": "The parts of a fused weight do not add up to it.",
        "role.repeated": "Two tensors hold the same weight.",
        "role.uneven": "An optional weight is there in some layers only.",
        "role.*": "A weight does not fit its role in the contract.",
        "tensor.unclaimed": "A tensor that no role of the contract names.",
        "tensor.ignored": "A tensor that is known to play no part.",
        "quantize.*": "What was, or could not be, quantised while the model is loaded.",
        "tokenizer.*": "The vocabulary is missing or no tokenizer can be built from it.",
        "template.type": "The chat template is no text.",
        "template.broken": "The chat template does not compile, or takes more than it may.",
        "template.fails": "The chat template does not render a single message of a user.",
        "template.drops": "The chat template leaves out what the user says.",
        "template.refuses": "The chat template refuses some kind of conversation.",
        "template.prompt": "The chat template does not open the turn of the assistant.",
        "template.suspicious": "The chat template has a construct that no chat needs.",
        "data.not_finite": "A tensor holds NaN or infinite values.",
        "data.range": "A tensor holds values beyond the largest float16.",
        "data.zero": "All values of a tensor are zero.",
        "data.zero_rows": "All values of some rows of a tensor are zero.",
        "data.unread": "A tensor of a type that no plugin can read.",
    }
)
"""What a rule says, by its id or a pattern (``*`` is anything); an exact id counts first, then the first match."""

STEPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "opens": ("file.refused", "plugin.failed"),
        "fits its contract": ("*",),
        "tokenizer": ("tokenizer.*",),
        "chat template": ("template.*",),
        "tensor data": ("data.*",),
    }
)
"""The steps of validation in order, each with the rules that belong to it; the most exact pattern counts."""


def describe_rule(rule: str) -> str:
    """What a rule says; of a plugin's own, that it is one."""
    exact = RULES.get(rule)
    found = exact or next((text for pattern, text in RULES.items() if fnmatchcase(rule, pattern)), None)
    return found or "A rule of a plugin."


def step_of(rule: str) -> str:
    """The step a rule belongs to; a plugin's rules belong to the contract's."""
    matching = [
        (len(pattern), step) for step, patterns in STEPS.items() for pattern in patterns if fnmatchcase(rule, pattern)
    ]
    return max(matching)[1]
