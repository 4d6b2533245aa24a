"""The generated parts of the pages. ``python -m tests.docs.reference`` (with ``.``) writes them anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cyclopts import App

from mortice.core.cli.config_text import markdown
from mortice.core.cli.main import make_app
from tests.docs.modules import ARCHITECTURE_PAGE, architecture_page

__all__ = ["CLI_PAGE", "CONFIG_PAGE", "cli_page", "commands", "config_page", "flags_of"]

DOCS = Path(__file__).resolve().parents[2] / "docs"
CLI_PAGE = DOCS / "reference" / "cli.md"
CONFIG_PAGE = DOCS / "reference" / "config.md"
_START, _END = "<!-- flags: written by tests/docs/reference.py -->\n", "<!-- end of flags -->"


def config_page() -> str:
    """``docs/reference/config.md``: what ``mortice config schema`` prints."""
    return f"# Config keys\n\n{markdown()}\n"


def cli_page(current: str) -> str:
    """``docs/reference/cli.md`` with its tables of flags renewed, the rest as it is."""
    before, _, rest = current.partition(_START)
    _, _, after = rest.partition(_END)
    return f"{before}{_START}{_tables()}{_END}{after}"


def commands() -> Iterator[tuple[str, App]]:
    """Every command that does something, by its full name (``config show``)."""
    app = make_app()
    for name in (name for name in app if not name.startswith("-")):
        command = app[name]
        inner = [part for part in command if not part.startswith("-")]
        if inner:
            yield from ((f"{name} {part}", command[part]) for part in inner)
        else:
            yield name, command


def flags_of(command: App) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """Names, help and group of every flag of a command."""
    for argument in command.assemble_argument_collection():
        if argument.show and argument.names[0].startswith("-"):
            groups = argument.parameter.group
            assert isinstance(groups, tuple)
            yield argument.names, argument.parameter.help or "", ", ".join(str(getattr(g, "name", g)) for g in groups)


def _tables() -> str:
    takers: dict[tuple[str, tuple[str, ...], str], list[str]] = {}
    for name, command in commands():
        for names, text, group in flags_of(command):
            takers.setdefault((group, names, text), []).append(name)
    every = sum(1 for _ in commands())
    parts = []
    for group in dict.fromkeys(group for group, _, _ in takers):
        title = "Of one command" if group == "Parameters" else group
        parts += ["", f"### {title}", "", "| flag | meaning | commands |", "| --- | --- | --- |"]
        for (own, names, text), found in takers.items():
            if own == group:
                flags = " ".join(f"`{name}`" for name in names)
                where = "all" if len(found) == every else ", ".join(found)
                parts.append(f"| {flags} | {text} | {where} |")
    return "\n".join(parts) + "\n\n"


if __name__ == "__main__":
    CONFIG_PAGE.write_text(config_page(), encoding="utf-8")
    CLI_PAGE.write_text(cli_page(CLI_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    ARCHITECTURE_PAGE.write_text(architecture_page(ARCHITECTURE_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
