"""Renders one chat template in a process of its own, which the kernel stops when it takes too much.

Run as a script by `chat`, never imported by it: a template is a program from a stranger, and only a process can be
held to a time and a memory whatever it calls. Reads and writes one JSON object a line. The first holds the template;
each later one holds variables, or asks for an audit, and is answered with the text or the reason why there is none.

CPU time is bounded by ITIMER_PROF, whose signal ends the process even inside a long C call; memory by RLIMIT_AS.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

__all__: list[str] = []


def _limit(setup: dict[str, Any]) -> None:
    for kind, amount in (
        (resource.RLIMIT_AS, setup["memory_bytes"]),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(kind)
        resource.setrlimit(kind, (amount if hard == resource.RLIM_INFINITY else min(amount, hard), hard))


def _sandbox() -> Any:
    """A sandbox set up as Hugging Face's `apply_chat_template` has it."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what a model is trained on; here it only shows its body."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"it reaches for the attribute {attribute!r} of {type(obj).__name__}")

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    def strftime_now(pattern: str) -> str:
        return dt.datetime.now().astimezone().strftime(pattern)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    sandbox.filters["tojson"] = tojson
    sandbox.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return sandbox


def _audit(sandbox: Any, source: str) -> str:
    from mortice.core.text.template_constructs import suspicious_constructs

    return json.dumps(suspicious_constructs(sandbox.parse(source), source))


def _render(template: Any, variables: dict[str, Any], output_chars: int) -> str:
    parts: list[str] = []
    left = output_chars
    for part in template.generate(**variables):
        left -= len(part)
        if left < 0:
            given = sum(len(message["content"]) for message in variables["messages"])
            raise ValueError(f"it prints more than {output_chars} characters for messages of {given} in all")
        parts.append(part)
    return "".join(parts)


def _answer(work: Callable[[], str], cpu_seconds: float) -> dict[str, str]:
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        answer = {"text": work()}
    except MemoryError:
        answer = {"error": "it needs too much memory"}
    except RecursionError:
        answer = {"error": "it recurses too deep"}
    except SyntaxError as error:  # its line is one of the Python that was made of the template
        answer = {"error": str(error.msg)}
    except Exception as error:  # noqa: BLE001 - whatever a template raises is its own fault
        line = getattr(error, "lineno", None)
        where = "" if line is None else f"line {line}: "
        answer = {"error": f"{where}{error}"[:500] or type(error).__name__}
    signal.setitimer(signal.ITIMER_PROF, 0)
    return answer


def _main() -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # whatever the parent made of it, here it ends the process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes our input
    setup = json.loads(sys.stdin.readline() or "null")
    if setup is None:
        return
    sys.path[:] = setup["sys_path"]
    import jinja2.sandbox  # noqa: F401 - imported before memory is limited and time is counted

    _limit(setup)
    sandbox = _sandbox()
    template: list[Any] = []

    def compile_template() -> str:
        template.append(sandbox.from_string(setup["template"]))
        return ""

    def answer_to(request: dict[str, Any]) -> str:
        if "audit" in request:
            return _audit(sandbox, setup["template"])
        return _render(template[0], request["render"], setup["output_chars"])

    answer = _answer(compile_template, setup["cpu_seconds"])
    while True:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        request = sys.stdin.readline()
        if not request:
            return
        answer = _answer(functools.partial(answer_to, json.loads(request)), setup["cpu_seconds"])


if __name__ == "__main__":
    _main()
