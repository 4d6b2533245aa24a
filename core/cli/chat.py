"""``mortice chat``: a conversation; what was fed before is not computed again."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from attrs import define, field

from mortice.core.cli.answer import Answer, check_prompt, give_answer, require_stdin, warn_unused
from mortice.core.cli.flags import (
    ConfigFlags,
    ConfigOrModel,
    ConversationFlags,
    ExecutorFlags,
    GenerationFlags,
    ModelFlags,
    PluginFlags,
    TalkFlags,
    config_or_model,
    settings,
)
from mortice.core.cli.render import Screen
from mortice.core.cli.stages import note_model, planned, resident
from mortice.core.errors import InputError
from mortice.core.text_file import require_utf8

if TYPE_CHECKING:
    from mortice.core.pipeline import Pipeline
    from mortice.core.session import Session
    from mortice.core.text.chat import ChatTemplate, Message
    from mortice.core.text.params import SamplingParams

__all__ = ["chat"]

_HELP = "/exit leaves, /reset forgets the conversation, /system TEXT starts anew with a system message"


def chat(
    config: ConfigOrModel = None,
    /,
    *,
    model: ModelFlags | None = None,
    conversation: ConversationFlags | None = None,
    generation: GenerationFlags | None = None,
    executor: ExecutorFlags | None = None,
    plugins: PluginFlags | None = None,
    any_key: ConfigFlags | None = None,
    talk: TalkFlags | None = None,
) -> int:
    """Talk with a model through its own chat template.

    Each line of standard input is a message. /exit leaves, /reset forgets the conversation, /system TEXT starts anew
    with a system message. Ctrl-C stops an answer; at the prompt it leaves.

    """
    from mortice.core.text.chat import ChatTemplate

    require_stdin()
    screen = Screen(quiet=talk is not None and talk.quiet)
    config, model = config_or_model(config, model)
    chosen = settings(config, model, conversation, generation, executor, plugins, any_key).config
    with planned(screen, chosen) as pipeline:
        note_model(screen, pipeline)
        pipeline.fit.require()
        template = ChatTemplate.from_metadata(pipeline.model.file.metadata, pipeline.tokenizer)
        try:
            warn_unused(screen, template, chosen.prompt)
            template.warm_up()
            resident(screen, pipeline)
            screen.note(_HELP)
            with pipeline.session() as session:
                talker = _Talk(
                    screen=screen, pipeline=pipeline, session=session, template=template, system=chosen.prompt.system
                )
                if chosen.prompt.text is not None:
                    talker.ask(chosen.prompt.text)
                talker.loop()
        finally:
            template.close()
    return 0


@define(eq=False, kw_only=True)
class _Talk:
    screen: Screen
    pipeline: Pipeline
    session: Session
    template: ChatTemplate
    system: str | None
    turns: list[Message] = field(factory=list)
    sampling: SamplingParams = field(init=False)

    def __attrs_post_init__(self) -> None:
        self.sampling = self.pipeline.config.sampling.seeded()

    def loop(self) -> None:
        """Until /exit or the end of the input; Ctrl-C at the prompt goes through."""
        interactive = sys.stdin.isatty()
        while True:
            try:
                line = _read_line(interactive=interactive)
                if line is None or line == "/exit":
                    return
                if line:
                    self._handle(line)
            except InputError as error:
                # a person can try something else; a script has to be told
                if not interactive:
                    raise
                self.screen.warn(str(error))

    def _handle(self, line: str) -> None:
        command, _, rest = line.partition(" ")
        if command == "/reset":
            self.turns.clear()
        elif command == "/system":
            self.system = rest.strip() or None
            self.turns.clear()
        elif command.startswith("/"):
            raise InputError(f"unknown command {command}; {_HELP}")
        else:
            self.ask(line)

    def ask(self, text: str) -> None:
        """One turn. A message that is refused leaves no trace; an answer that was stopped stays as far as it came."""
        from mortice.core.text.chat import Message, encode_chat

        self.turns.append(Message(role="user", content=text))
        system = [] if self.system is None else [Message(role="system", content=self.system)]
        try:
            variables = self.pipeline.config.prompt.chat_variables
            ids = encode_chat(self.pipeline.tokenizer, self.template, [*system, *self.turns], variables=variables)
            check_prompt(self.pipeline, ids, "/reset forgets the conversation")
            answer = Answer(prompt_tokens=len(ids))
            try:
                generation = self.pipeline.config.generation
                give_answer(self.screen, self.pipeline, self.session, ids, self.sampling, generation, answer)
            except KeyboardInterrupt:
                self.screen.note("(stopped)")
        except BaseException:
            del self.turns[-1:]
            raise
        if not answer.pieces:  # stopped while the prompt was fed: as if it had not been asked
            del self.turns[-1:]
            return
        self.turns.append(Message(role="assistant", content=answer.text))
        self.screen.note(answer.speed_text())


def _read_line(*, interactive: bool) -> str | None:
    """The next line without its end and blanks around it; None at the end of the input."""
    if interactive and sys.stdout.isatty():
        import readline  # noqa: F401 (line editing in input())

        try:
            return input("> ").strip()
        except EOFError:
            print()
            return None
    if interactive:
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        line = sys.stdin.readline()
        require_utf8(line)  # in the C locale Python hands other bytes on as surrogates
    except UnicodeDecodeError as error:
        raise InputError(f"standard input: not UTF-8 at byte {error.start}") from None
    except ValueError as error:
        raise InputError(f"standard input: {error}") from None
    return line.strip() if line else None
