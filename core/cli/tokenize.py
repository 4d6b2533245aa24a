"""``mortice tokenize``: text to token ids, with the tokenizer of a file."""

from __future__ import annotations

from typing import Annotated

from cyclopts import Parameter

from mortice.core.cli.answer import read_stdin
from mortice.core.cli.flags import CommonFlags, ModelPath
from mortice.core.cli.render import printable
from mortice.core.counts import counted
from mortice.core.errors import InputError
from mortice.core.text_file import require_utf8

__all__ = ["tokenize"]


def tokenize(
    file: ModelPath,
    text: Annotated[
        str,
        Parameter(allow_leading_hyphen=True, help="The text; - reads it from standard input, exactly as it is."),
    ],
    /,
    *,
    special: Annotated[
        bool, Parameter(help="Read the text of a control token as that token, and add BOS where the file asks for it.")
    ] = True,
    common: CommonFlags | None = None,
) -> int:
    """Show the token ids of a text."""
    from mortice.core.stages import open_file, registry_for
    from mortice.core.text.tokenizer import Tokenizer

    common = common or CommonFlags()
    screen = common.screen()
    chosen = common.settings().config
    if text == "-":
        text = read_stdin()
    try:
        require_utf8(text)
    except ValueError as error:
        raise InputError(f"text: {error}") from None
    with open_file(registry_for(chosen), file) as opened:
        tokenizer = Tokenizer.of(opened)
        ids = tokenizer.encode(text, add_special=special, parse_special=special)
        pieces = [tokenizer.piece(token) for token in ids]
    screen.result({"ids": ids, "pieces": pieces, "count": len(ids)})
    screen.table((">id", "piece"), [(str(token), printable(piece)) for token, piece in zip(ids, pieces, strict=True)])
    screen.say(counted(len(ids), "token"))
    return 0
