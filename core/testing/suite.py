"""What a conformance suite is: a class whose ``test_…`` methods are its checks, run by pytest or without it.

A plugin's tests subclass a suite and name the thing to be checked::

    class TestTernary(QTypeSuite):
        type = TERNARY

pytest collects that like any class of tests; ``mortice plugins check`` runs the same methods through `outcomes`. So a
check uses nothing of pytest: it takes ``tmp_path``, an empty folder, or the argument that `each` names, it fails with
`fail` or `require`, and is left out with `unittest.SkipTest`, which pytest understands too.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, Self, TypeVar, cast
from unittest import SkipTest

from attrs import frozen

from mortice.core.plugin.conformance import describe

__all__ = ["CheckError", "Outcome", "Suite", "each", "fail", "needs_gpu", "outcomes", "require", "skip"]

T = TypeVar("T")
Check = TypeVar("Check", bound=Callable[..., None])


class CheckError(AssertionError):
    """A check failed; the message says what was found and what was wanted."""


def fail(message: str) -> NoReturn:
    """End a check: it failed."""
    raise CheckError(message)


def require(condition: object, message: str) -> None:
    """Fail with `message` unless `condition` holds. Unlike ``assert`` it does so under ``python -O`` too."""
    if not condition:
        fail(message)


def skip(reason: str) -> NoReturn:
    """End a check that cannot be made here; the reason is shown."""
    raise SkipTest(reason)


def each(argument: str, cases: Iterable[Any] | Callable[[Any], Iterable[Any]]) -> Callable[[Check], Check]:
    """Run a check once for every one of `cases`, or of what ``cases(suite)`` gives, passed as `argument`."""
    give = cases if callable(cases) else lambda _: cases

    def mark(check: Check) -> Check:
        check.mortice_cases = (argument, give)  # type: ignore[attr-defined]  # read by `Suite` and by `outcomes`
        return check

    return mark


def needs_gpu(check: Check) -> Check:
    """Say that a check runs on a GPU; pytest gives it the marker ``gpu``."""
    check.mortice_gpu = True  # type: ignore[attr-defined]  # as above
    return check


class Suite:
    """Base of the suites. pytest makes an object for each check; what is dear to make is kept with the class."""

    _made: ClassVar[dict[str, Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._made = {}

    def once(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gives, made once for all checks of the class."""
        made = self._made
        if name not in made:
            made[name] = make()
        return cast("T", made[name])

    @classmethod
    def of(cls, **attributes: Any) -> Self:
        """A suite of given attributes, without writing a class."""
        unknown = sorted(name for name in attributes if not hasattr(cls, name) and name not in _annotations(cls))
        if unknown:
            raise TypeError(f"{cls.__name__} has no attribute {', '.join(unknown)}")
        return cast("Self", type(cls.__name__, (cls,), attributes)())

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Called by pytest for every check."""
        if hasattr(metafunc.function, "mortice_cases"):
            argument, cases = metafunc.function.mortice_cases
            values = list(cases(self))
            metafunc.parametrize(argument, values, ids=[_label(value) for value in values])


@frozen
class Outcome:
    """What became of a check.

    Attributes:
        check: its name in words, with the case in brackets.
        status: how it ended.
        message: why it failed or was skipped, in one line.
        seconds: how long it took.

    """

    check: str
    status: Literal["passed", "failed", "skipped"]
    message: str = ""
    seconds: float = 0.0


def outcomes(suite: Suite, only: str = "") -> Iterator[Outcome]:
    """Run every check of a suite whose name has `only` in it, each in an empty folder of its own."""
    for name, check in _checks(type(suite)):
        words = name.removeprefix("test_").replace("_", " ")
        if only not in words:
            continue
        argument, cases = getattr(check, "mortice_cases", ("", lambda _: (None,)))
        try:
            values: Sequence[Any] = list(cases(suite))
        except Exception as error:  # noqa: BLE001 (the thing under test may raise anything)
            yield Outcome(words, "failed", describe(error))
            continue
        for value in values:
            label = f"{words} [{_label(value)}]" if argument else words
            yield _outcome(label, suite, check, {argument: value} if argument else {})


def _outcome(label: str, suite: Suite, check: Callable[..., None], arguments: dict[str, Any]) -> Outcome:
    started = time.perf_counter()
    status: Literal["passed", "failed", "skipped"] = "passed"
    message = ""
    with tempfile.TemporaryDirectory(prefix="mortice-check-", ignore_cleanup_errors=True) as folder:
        if "tmp_path" in inspect.signature(check).parameters:
            arguments = {**arguments, "tmp_path": Path(folder)}
        try:
            check(suite, **arguments)
        except SkipTest as reason:
            status, message = "skipped", str(reason)
        except CheckError as error:
            status, message = "failed", "; ".join(str(error).splitlines())
        except Exception as error:  # noqa: BLE001 (the thing under test may raise anything)
            status, message = "failed", describe(error)
    return Outcome(label, status, message, time.perf_counter() - started)


def _checks(kind: type) -> Iterator[tuple[str, Callable[..., None]]]:
    """The checks of a class, those of its bases first, in the order they are written."""
    names = dict.fromkeys(name for base in reversed(kind.__mro__) for name in vars(base) if name.startswith("test_"))
    for name in names:
        yield name, getattr(kind, name)


def _annotations(kind: type) -> set[str]:
    return {name for base in kind.__mro__ for name in inspect.get_annotations(base)}


def _label(value: object) -> str:
    return str(getattr(value, "label", value))
