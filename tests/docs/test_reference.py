"""Every config key and every flag is documented, and the pages are up to date."""

from __future__ import annotations

from mortice.core.config_keys import config_keys, variable_of
from tests.docs.reference import CLI_PAGE, CONFIG_PAGE, cli_page, commands, config_page, flags_of

RENEW = "run `python -m tests.docs.reference` from the project's folder"


def test_the_page_of_config_keys_is_what_the_command_prints() -> None:
    assert CONFIG_PAGE.read_text(encoding="utf-8") == config_page(), RENEW


def test_the_tables_of_flags_are_those_of_the_commands() -> None:
    current = CLI_PAGE.read_text(encoding="utf-8")
    assert current == cli_page(current), RENEW


def test_every_key_with_its_variable_is_on_the_page() -> None:
    page = CONFIG_PAGE.read_text(encoding="utf-8")
    missing = [key for key in config_keys() if f"`{variable_of(key)}`" not in page]
    assert not missing


def test_every_flag_of_every_command_is_on_the_page_and_explained() -> None:
    page = CLI_PAGE.read_text(encoding="utf-8")
    found = [
        (name, flag, text) for name, command in commands() for names, text, _ in flags_of(command) for flag in names
    ]
    assert len(found) > 100
    assert [entry for entry in found if f"`{entry[1]}`" not in page or not entry[2]] == []


def test_every_command_is_on_the_page() -> None:
    page = CLI_PAGE.read_text(encoding="utf-8")
    names = [name for name, _ in commands()]
    assert {"run", "chat", "plugins list", "config init", "config schema", "config show"} <= set(names)
    assert [name for name in names if f"mortice {name.partition(' ')[0]} " not in page] == []
