"""What plugins are and give, held against what is wanted, when it is given rather than when it first goes wrong.

A check yields every fault it finds, each one a phrase that follows the name of the plugin and the hook.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import numpy as np
from attrs import define, field, frozen
from numpy.typing import NDArray

from mortice.arch_contracts.consistency import contradictions
from mortice.arch_contracts.schema import Contract
from mortice.core.counts import counted
from mortice.core.errors import MorticeError, PluginError
from mortice.core.model.findings import Finding, Severity
from mortice.core.model.operators import OPERATOR_KINDS
from mortice.core.model.qtypes import GGML_TYPES, QType
from mortice.core.model.residency import ResidentWeights
from mortice.core.model.types import ModelFile, TensorView
from mortice.core.model.weight_plan import Kernel, Layout
from mortice.core.plugin.hookspecs import PROJECT, HookSpecs
from mortice.core.plugin.interfaces import Emit, Executor, QuantizationType, UploadStrategy

__all__ = [
    "CheckedDequantize",
    "CheckedUpload",
    "contract_faults",
    "describe",
    "elements",
    "executor_faults",
    "finding_faults",
    "hook_faults",
    "kernel_faults",
    "model_faults",
    "naming",
    "protocol_faults",
    "qtype_faults",
    "upload_faults",
]


def describe(error: BaseException) -> str:
    """An exception in one line; the type is left out for our own, whose messages are made to be read."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    if isinstance(error, MorticeError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def naming(origin: str, doing: str, *, note: bool = True) -> Iterator[None]:
    """Make whatever a plugin raises inside name it.

    Our own exceptions and Ctrl-C keep their type and message and get a note (``add_note``) that names `origin`;
    everything else, ``SystemExit`` and the panics of compiled extensions included, becomes a `PluginError`.

    Args:
        origin: who, as in ``plugin acme (acme-plugin 1.0)``.
        doing: what was asked of it.
        note: false for built-ins, whose refusals are mortice's own and stay one line.

    """
    try:
        yield
    except GeneratorExit:
        raise
    except KeyboardInterrupt as error:
        if note:
            error.add_note(f"in {origin}, {doing}")
        raise
    except MorticeError as error:
        if note and origin not in str(error):
            error.add_note(f"raised by {origin} in {doing}")
        raise
    except BaseException as error:
        raise PluginError(f"{origin}: {doing}: {describe(error)}") from error


@frozen(eq=False)
class CheckedDequantize:
    """A plugin's `QuantizationType.dequantize` whose faults name the plugin, and whose result is as promised."""

    origin: str
    qtype: QType
    function: Callable[[NDArray[np.uint8]], NDArray[np.float32]]

    def __call__(self, rows: NDArray[np.uint8]) -> NDArray[np.float32]:
        doing = f"dequantize {self.qtype.name}"
        with naming(self.origin, doing):
            values = self.function(rows)
        wanted = (rows.shape[0], rows.shape[1] // self.qtype.block_bytes * self.qtype.block_elements)
        if not isinstance(values, np.ndarray) or values.dtype != np.float32 or values.shape != wanted:
            found = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
            raise PluginError(f"{self.origin}: {doing}: returned {found}, wanted float32 {wanted}")
        return values


@define(eq=False)
class CheckedUpload:
    """A plugin's `UploadStrategy` that is held to what `upload` promises; who breaks it is named."""

    origin: str
    strategy: UploadStrategy
    name: str = field(init=False)
    device_kind: str = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.name, self.device_kind = self.strategy.name, self.strategy.device_kind

    def upload(self, resident: ResidentWeights, emit: Emit) -> int:
        """As `UploadStrategy.upload`.

        Raises:
            PluginError: when it did not give the number of bytes, or left a weight that is not marked.

        """
        moved: object = self.strategy.upload(resident, emit)
        said = f"{self.origin}: upload strategy {self.name!r}"
        if not isinstance(moved, int) or isinstance(moved, bool) or moved < 0:
            raise PluginError(f"{said}: upload returned {moved!r:.40}, wanted the number of bytes it wrote, an int")
        left = [planned.tensor.name for _, planned in resident.missing()]
        if left:
            weights = counted(len(resident.plan.weights), "weight")
            raise PluginError(
                f"{said}: {len(left)} of {weights} not marked as resident when upload returned, the first is "
                f"{left[0]}; call resident.mark(index) for each weight that is in place"
            )
        return moved


# what plugins are -------------------------------------------------------------------------------------------------


def hook_faults(plugin: object, options_of: Callable[[str], Mapping[str, Any] | None]) -> Iterator[str]:
    """Faults of a plugin object: hooks misspelt, unmarked, with unknown arguments, or with an order of their own.

    Args:
        plugin: a module or an object.
        options_of: what ``@hookimpl`` said about an attribute, or None when it is not marked.

    """
    hooks = [name for name in vars(HookSpecs) if name.startswith(f"{PROJECT}_")]
    marked = 0
    for name in dir(plugin):
        options = options_of(name)
        if options is None:
            if name.startswith(f"{PROJECT}_") and callable(inspect.getattr_static(plugin, name, None)):
                yield f"{name} is not marked with @hookimpl"
            continue
        marked += 1
        hook = options.get("specname") or name
        if hook in hooks:
            yield from _argument_faults(hook, getattr(plugin, name))
        elif not options.get("optionalhook"):
            near = difflib.get_close_matches(hook, hooks, 1)
            yield f"there is no hook {hook}; " + (
                f"did you mean {near[0]}?" if near else f"hooks are {', '.join(hooks)}"
            )
        if options.get("wrapper") or options.get("hookwrapper"):
            yield f"{name} is a hook wrapper; a plugin may not stand between others and the core"
        if options.get("tryfirst") or options.get("trylast"):
            yield f"{name} asks for a place in the order of calls; there is none, [plugins.prefer] decides conflicts"
    if not marked:
        yield f"{_kind(plugin)} has no hook: no function in it is marked with @hookimpl"


def _argument_faults(hook: str, function: Callable[..., object]) -> Iterator[str]:
    """Arguments pluggy could not pass, or would leave out in silence: it passes only those that have no default."""
    offered = [name for name in inspect.signature(getattr(HookSpecs, hook)).parameters if name != "self"]
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        if parameter.name not in offered and required:
            yield f"{hook} has no argument {parameter.name!r}; it has {', '.join(offered) or 'none'}"
        elif parameter.name in offered and (not required or parameter.kind is parameter.KEYWORD_ONLY):
            yield f"{hook}: {parameter.name} has to be a plain argument without a default, or it would never be passed"


# what hooks give --------------------------------------------------------------------------------------------------


def contract_faults(value: object) -> Iterator[str]:
    """Faults of an architecture contract; one built by hand is held against the rules of a parsed one."""
    yield from _type_faults(value, Contract)
    if isinstance(value, Contract):
        yield from (f"contract {value.name!r}: {fault}" for fault in contradictions(value))


def qtype_faults(value: object) -> Iterator[str]:
    """Faults of a quantisation type: its parts, and GGML's names and ids used for something else."""
    if not isinstance(value, QuantizationType):
        yield from _type_faults(value, QuantizationType)
        return
    qtype = value.qtype
    for known in GGML_TYPES.values():
        if (known.id == qtype.id or known.name == qtype.name) and known != qtype:
            yield f"{qtype} contradicts GGML's {known}; take a name and an id that GGML does not use"


def upload_faults(value: object) -> Iterator[str]:
    """Faults of an upload strategy."""
    yield from protocol_faults(value, UploadStrategy)
    yield from _name_faults(value)
    kind = getattr(value, "device_kind", "cpu")
    if kind not in ("cpu", "cuda"):
        yield f"{_label(value)}: device_kind is {kind!r}, wanted 'cpu' or 'cuda'"


def executor_faults(value: object) -> Iterator[str]:
    """Faults of an executor."""
    yield from protocol_faults(value, Executor)
    yield from _name_faults(value)


def kernel_faults(value: object) -> Iterator[str]:
    """Faults of a kernel."""
    if not isinstance(value, Kernel):
        yield from _type_faults(value, Kernel)
        return
    if value.operator not in OPERATOR_KINDS:
        yield f"there is no operator {value.operator!r}; operators are {', '.join(sorted(OPERATOR_KINDS))}"
    yield from protocol_faults(value.layout, Layout)


def finding_faults(value: object) -> Iterator[str]:
    """Faults of a finding."""
    if not isinstance(value, Finding):
        yield from _type_faults(value, Finding)
    elif value.severity not in get_args(Severity):
        yield f"{value.rule}: severity is {value.severity!r}, wanted one of {', '.join(get_args(Severity))}"


def model_faults(value: object) -> Iterator[str]:
    """Faults of an opened model: what the stages after it take for granted."""
    if not isinstance(value, ModelFile):
        yield from _type_faults(value, ModelFile)
        return
    if not isinstance(value.metadata, Mapping) or not isinstance(value.tensors, Mapping):
        yield "metadata and tensors are to be mappings by name"
        return
    for key, item in value.metadata.items():
        if not isinstance(key, str):
            yield f"metadata key {key!r} is not a string"
        elif not _is_metadata(item):
            wanted = "a scalar, a NumPy array of one dimension or a sequence of strings"
            yield f"metadata {key!r:.80} is {type(item).__name__}, wanted {wanted}"
    for name, view in value.tensors.items():
        if not isinstance(view, TensorView):
            yield f"tensor {name!r} is a {type(view).__name__}, wanted a TensorView"
        elif view.name != name:
            yield f"tensor {name!r} stands under another name than its own, {view.name!r}"
        elif view.make is None and (view.data.dtype != np.uint8 or view.data.ndim != 1):
            yield f"tensor {name!r}: data is {view.data.dtype} {view.data.shape}, wanted uint8 in one dimension"


def _is_metadata(value: object) -> bool:
    """Whether it is a `MetadataValue`, as far as its first item tells; none is asked for that may be made only then."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "biuf"
    if isinstance(value, bool | int | float | str | np.generic):
        return True
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray):
        return False
    return not value or not isinstance(value, list | tuple) or isinstance(value[0], str)


def protocol_faults(value: object, protocol: type) -> Iterator[str]:
    """What `value` lacks of a protocol: attributes, methods, or arguments that the core will pass."""
    if isinstance(value, type):
        yield f"gave the class {value.__name__}, wanted an object of it"
        return
    label = _label(value, protocol)
    for name in dict.fromkeys((*inspect.get_annotations(protocol), *vars(protocol))):
        if name.startswith("_"):
            continue
        if not hasattr(value, name):
            yield f"{label} has no {name}"
        elif inspect.isfunction(declared := vars(protocol).get(name)):
            parameters = list(inspect.signature(declared).parameters)[1:]
            if not _takes(getattr(value, name), len(parameters)):
                yield f"{label}: {name} is to be a method that takes ({', '.join(parameters)})"


def _takes(function: object, count: int) -> bool:
    if not callable(function):
        return False
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some compiled functions have none; the call will tell
        return True
    try:
        signature.bind(*[None] * count)
    except TypeError:
        return False
    return True


def _name_faults(value: object) -> Iterator[str]:
    name = getattr(value, "name", None)
    if name is not None and (not isinstance(name, str) or not name):
        yield f"{type(value).__name__}: name is {name!r}, wanted a non-empty string"
    elif name == "auto":
        yield f"{type(value).__name__}: the name 'auto' is taken: in a config it means to choose"


def _type_faults(value: object, wanted: type) -> Iterator[str]:
    if not isinstance(value, wanted):
        yield f"gave {_kind(value)}, wanted {wanted.__name__}"


def _label(value: object, protocol: type | None = None) -> str:
    """What an object calls itself, beside its type."""
    name = getattr(value, "name", None)
    kind = type(value).__name__
    if isinstance(name, str) and name:
        return f"{kind} {name!r}"
    return f"{kind}, given as {protocol.__name__}," if protocol is not None else kind


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


def elements(result: object) -> list[Any] | None:
    """What a collected hook gave as a list; None gave nothing, and is returned for what cannot be gone through."""
    if result is None:
        return []
    return list(result) if isinstance(result, Iterable) and not isinstance(result, str | bytes | Mapping) else None
