"""python -m prepare_data SOURCE [--option=value …]"""

import difflib
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import config
from errors import UserError, run_script
from prepare_data import PrepareOptions, SourceOptions
from prepare_data.pipeline import SOURCES, dry_run, make_corpus, prepare


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character of the sample shows another
    if not argv or argv[0] in ("--help", "-h"):
        config.load("prepare_data", ["--help"])
    source, *rest = argv
    options = config.load("prepare_data", rest)
    if source not in SOURCES:
        near = difflib.get_close_matches(source, SOURCES, n=1)
        raise UserError(
            f"{source}: no such source"
            + (f"; did you mean {near[0]}?" if near else f"; expected one of {', '.join(SOURCES)}")
        )
    for note in options.notes:
        print(note)
    asked, how = options.section(SourceOptions), options.section(PrepareOptions)
    if asked.input == "-" and not asked.name and not asked.dry_run:
        raise UserError("--input=- gives the dataset no name: add --name=NAME")
    corpus = make_corpus(source, asked.input, how)
    if asked.dry_run:
        dry_run(corpus, how)
        return 0
    name = asked.name or (source if source != "text" else corpus.name)
    try:
        prepare(corpus, how, name, asked.overwrite)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    print(
        f"next: python train.py --data={shlex.quote(name if how.data_dir == 'data' else str(Path(how.data_dir) / name))}"
    )
    return 0


if __name__ == "__main__":
    run_script(main)
