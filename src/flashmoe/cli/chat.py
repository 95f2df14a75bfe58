"""`flashmoe chat`: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated

import typer

from flashmoe.cli import options
from flashmoe.cli.chat_commands import Commands
from flashmoe.cli.groups import with_options
from flashmoe.cli.pipe import Pipe
from flashmoe.cli.progress import stderr_console
from flashmoe.cli.report import show
from flashmoe.cli.sampling import ChatOptions, SamplingOptions
from flashmoe.common.text import argument
from flashmoe.errors import FlashMoEError
from flashmoe.runtime.conversation import Conversation


@with_options
def chat(
    *,
    model: options.Model,
    system: Annotated[str, typer.Option("--system", help="System prompt.")] = "",
    loading: options.ModelOptions,
    n_predict: options.NPredict = -1,
    sampling: SamplingOptions,
    chat_options: ChatOptions,
    trace: options.Trace = None,
    json_file: options.Json = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Chat with a model that may be larger than memory. Piped input is read line by line, one message per line."""
    system = argument(system, "--system")
    console = stderr_console(quiet)
    user = Pipe(console)
    if sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty():
        from flashmoe.cli.terminal import Terminal  # before memory is counted: it takes some

        user = Terminal(console)
    from flashmoe.runtime.load import (
        load,  # after the arguments are known to be good: it takes a moment to import
    )

    with user.progress:
        asked = loading.load_options(trace=trace is not None, server=chat_options.server())
        loaded = load(model, options=asked, progress=user.progress.update)
    with loaded:
        talk = Conversation(loaded, system=system, max_tokens=n_predict, sampling=sampling.sampling())
        stopped = False
        try:
            converse(user, talk, Commands(loaded, talk))
        except KeyboardInterrupt:
            stopped = True
        report = loaded.report("\n".join(m["content"] for m in talk.messages if m["role"] == "assistant"))
    show(console, report)
    if trace and loaded.recorder is not None:
        loaded.recorder.save(trace)
    if json_file:
        json_file.write(report.as_dict())
    if stopped:
        raise KeyboardInterrupt


def converse(user: Pipe, talk: Conversation, commands: Commands) -> None:
    """Answer the user's messages until the user leaves."""
    for line in user.lines(commands.names):
        if not line.strip():
            continue
        try:
            reply = commands.run(line.strip())
            if reply is None:
                user.hear(talk.stream(line))
                for note in notes(talk):
                    user.note(note)
            elif reply:
                user.reply(reply)
        except FlashMoEError as error:
            user.fail(error)
        except KeyboardInterrupt:
            user.stop()
        if commands.quit:
            return


def notes(talk: Conversation) -> Iterator[str]:
    """Notes on the last turn: its speed, and what was cut off."""
    turn = talk.turn
    if turn.made > 1:
        yield f"{turn.made} tokens, {turn.tokens_per_second:.1f} tokens/s, hit rate {turn.hit_rate:.1%}"
    if turn.forgotten:
        yield f"the context is full: the model has forgotten the {turn.forgotten} oldest turns"
    if turn.finished == "length":
        yield "the answer ends here: its limit (-n) or the context's end (-c) is reached"
