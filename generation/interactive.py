"""sample.py --interactive: each typed line is appended to the text, and the model continues it.

The text is kept as ids, so that generated text is not tokenized again. A command such as /temperature 0.7 adds a flag
to the command line, so options are parsed and checked as there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields

from common.tokenizer import Tokenizer
from errors import UserError
from generation.engine import END_OF_SEQUENCE, STOP
from generation.novelty import describe
from generation.options import SamplingOptions
from generation.text import prompt_ids, stream_texts
from model import GPT
from prepare_data.novelty import Novelty

OPTIONS = [field.name for field in fields(SamplingOptions)]
HELP = """\
Type a line and the model continues it; an empty line continues the text. Ctrl-C stops the model, Ctrl-D quits.
  a line that ends with \\     is joined with the next line by a line break
  /retry                      replace the last answer with another one
  /undo                       remove your last line and its answer
  /new                        start a new document
  /text                       show the whole text
  /temperature 0.7            set an option (any of the group "sampling" in --help, or seed)
  /options                    show the options
  /quit                       quit
  //…                         a line of text that starts with /"""
LoadOptions = Callable[[list[str]], tuple[SamplingOptions, int]]  # flags to add → sampling options, seed


def interact(
    model: GPT, tokenizer: Tokenizer, prompt: str, load_options: LoadOptions, novelty: Novelty | None = None
) -> int:
    """Reads lines until end of file, returns 0. novelty: tells what each answer has copied. Raises UserError if
    `prompt`, the initial text, cannot be encoded."""
    with suppress(ImportError):  # not on Windows, whose console has line editing of its own
        import readline  # noqa: F401  # gives input() line editing and history
    session = _Session(model, tokenizer, load_options, novelty)
    print("type /help for help; Ctrl-D quits", file=sys.stderr)
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
            print("\n(Ctrl-D quits)", file=sys.stderr)
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
    """The text so far, as turns: (typed ids, answered ids, number of /retry)."""

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, load_options: LoadOptions, novelty: Novelty | None = None
    ) -> None:
        self.model, self.tokenizer, self.load_options, self.novelty = model, tokenizer, load_options, novelty
        self.flags: list[str] = []
        self.sampling, self.seed = load_options([])
        self.turns: list[tuple[list[int], list[int], int]] = []
        self.ended = False  # by an end-of-sequence token

    def type(self, text: str) -> None:
        if self.ended or not self.turns:
            typed = prompt_ids(self.tokenizer, text, self.sampling.prepend_eos)
        else:
            typed = self.tokenizer.encode(text).tolist()
        if self.ended:
            print("(the document has ended; this starts a new one)", file=sys.stderr)
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
                raise UserError(f"/{name}: the text is empty")
            *turns, (typed, _, retries) = self.turns
            if name == "retry":
                self._answer(turns, typed, retries + 1)
            else:
                self.turns, self.ended = turns, False
        elif name in (*OPTIONS, "seed") and value:
            flags = [*self.flags, f"--{name}={value}"]
            self.sampling, self.seed = self.load_options(flags)
            self.flags = flags
        else:
            problem = "its value is missing" if name in (*OPTIONS, "seed") else "unknown command"
            raise UserError(f"/{name}: {problem}; /help lists the commands")

    def _answer(self, turns: list[tuple[list[int], list[int], int]], typed: list[int], retries: int) -> None:
        """Generates and prints an answer after these turns and the typed ids; Ctrl-C stops it and keeps its text."""
        context = [token for old, answer, _ in turns for token in old + answer]
        text, answer, reason = "", list[int](), "stopped"
        pieces = stream_texts(self.model, self.tokenizer, [context + typed], self.sampling, self.seed, draws=[retries])
        try:
            for piece in pieces:
                print(piece.text, end="", flush=True)
                text += piece.text
                answer += [token.id for token in piece.tokens]
                reason = piece.reason or reason
        except KeyboardInterrupt:
            pass  # `reason` is "stopped"
        if reason == STOP:  # the last token may contain the start of the stop string
            answer = self.tokenizer.encode(text).tolist()
        self.turns = [*turns, (typed, answer, retries)]
        self.ended = reason == END_OF_SEQUENCE
        print(flush=True)
        print(f"({reason}, {len(answer)} tokens)", file=sys.stderr)
        if self.novelty:
            given = self.tokenizer.decode(context + typed)
            [copied] = self.novelty.check([(given, text)])
            print(describe(copied, self.novelty), file=sys.stderr)
