"""Writing together with the model at a terminal: a line that is typed is added to the text, and the model goes on from there.

The text is kept as ids, so what the model wrote is never tokenized anew. Commands that change an option are flags added to the command
line: they are checked and read in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields

from common.tokenizer import Tokenizer
from errors import UserError
from generation.engine import END_OF_SEQUENCE, STOP
from generation.options import SamplingOptions
from generation.text import prompt_ids, stream_texts
from model import GPT

OPTIONS = [field.name for field in fields(SamplingOptions)]
HELP = """\
Type, and the model goes on from the end of your line; an empty line lets it write on. Ctrl-C stops it, Ctrl-D leaves.
  a line that ends with \\     goes on in the next line, with a line break between them
  /retry                      another answer in the place of the last one
  /undo                       takes your last line and its answer back
  /new                        forgets the text and begins a new document
  /text                       shows the whole text
  /temperature 0.7            changes an option (any of the group "sampling" in --help, and seed)
  /options                    shows the options
  /quit                       leaves
  //…                         a line of text that begins with /"""


def interact(
    model: GPT, tokenizer: Tokenizer, prompt: str, load: Callable[[list[str]], tuple[SamplingOptions, int]]
) -> int:
    """Reads lines until their end and returns 0. `load`: flags to add to the command line → sampling options and seed. Raises UserError
    where `prompt`, the beginning of the text, cannot be encoded."""
    with suppress(ImportError):  # Windows has none, and its console does the same
        import readline  # noqa: F401  # input() now edits lines and remembers them
    session = _Session(model, tokenizer, load)
    print("type /help for help; Ctrl-D leaves", file=sys.stderr)
    if prompt:
        print(prompt, end="", flush=True)
        session.type(prompt)
    typed = ""
    while True:
        try:
            line = input("… " if typed else "> ")
        except EOFError:
            print(file=sys.stderr)
            return 0
        except KeyboardInterrupt:
            print("\n(Ctrl-D leaves)", file=sys.stderr)
            typed = ""
            continue
        if line.endswith("\\"):
            typed += line[:-1] + "\n"
            continue
        if not typed and line in ("/quit", "/exit"):
            return 0
        try:
            if not typed and line.startswith("/") and not line.startswith("//"):
                session.command(*line[1:].split(maxsplit=1))
            else:
                session.type(typed + line if typed else line[line.startswith("//") :])
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
        typed = ""


class _Session:
    """The text so far, as turns: what was typed and what was answered, both ids, and how often an answer was drawn."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, load: Callable[[list[str]], tuple[SamplingOptions, int]]
    ) -> None:
        self.model, self.tokenizer, self.load = model, tokenizer, load
        self.flags: list[str] = []
        self.sampling, self.seed = load([])
        self.turns: list[tuple[list[int], list[int], int]] = []
        self.ended = False

    def type(self, text: str) -> None:
        first = self.ended or not self.turns
        typed = (
            prompt_ids(self.tokenizer, text, self.sampling.prepend_eos)
            if first
            else self.tokenizer.encode(text).tolist()
        )
        if self.ended:
            print("(the document has ended; this begins a new one)", file=sys.stderr)
            self.turns = []
        self._answer(self.turns, typed, 0)

    def command(self, name: str = "", value: str = "") -> None:
        if name == "help":
            print(HELP, file=sys.stderr)
        elif name == "options":
            print(
                *(f"  {name} = {getattr(self.sampling, name)!r}" for name in OPTIONS),
                f"  seed = {self.seed}",
                sep="\n",
                file=sys.stderr,
            )
        elif name == "text":
            ids = [token for typed, answer, _ in self.turns for token in typed + answer]
            print(self.tokenizer.decode(token for token in ids if token != self.tokenizer.eos_id))
        elif name == "new":
            self.turns, self.ended = [], False
        elif name in ("undo", "retry"):
            if not self.turns:
                raise UserError(f"/{name}: nothing was written yet")
            *turns, (typed, _, tries) = self.turns
            if name == "retry":
                self._answer(turns, typed, tries + 1)
            else:
                self.turns, self.ended = turns, False
        elif name in (*OPTIONS, "seed") and value:
            flags = [*self.flags, f"--{name}={value}"]
            self.sampling, self.seed = self.load(flags)
            self.flags = flags
        else:
            missing = ", or its value is missing" if name in (*OPTIONS, "seed") else ""
            raise UserError(f"/{name}: no such command{missing}; /help lists them")

    def _answer(self, turns: list[tuple[list[int], list[int], int]], typed: list[int], tries: int) -> None:
        """Lets the model go on from these turns and what was typed; Ctrl-C ends it, and what it wrote so far stays."""
        before = [token for old, answer, _ in turns for token in old + answer]
        text, answer, reason = "", list[int](), "stopped"
        pieces = stream_texts(self.model, self.tokenizer, [before + typed], self.sampling, self.seed, draws=[tries])
        try:
            for piece in pieces:
                print(piece.text, end="", flush=True)
                text += piece.text
                answer += [token.id for token in piece.tokens]
                reason = piece.reason or reason
        except KeyboardInterrupt:
            pass  # `reason` says so
        if reason == STOP:  # the last token may hold the beginning of the stop string
            answer = self.tokenizer.encode(text).tolist()
        self.turns = [*turns, (typed, answer, tries)]
        self.ended = reason == END_OF_SEQUENCE
        print(flush=True)
        print(f"({reason}, {len(answer)} tokens)", file=sys.stderr)
