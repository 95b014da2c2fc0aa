"""python -m prepare_data SOURCE [--option=value …]: writes a dataset; with --dry_run, describes it. See pipeline.py."""

from errors import UserError, quote, run_script, start_script

if __name__ == "__main__":
    start_script()  # before the imports that take time

import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import config
from common.option import did_you_mean
from prepare_data import SOURCES, PrepareOptions, SourceOptions, folders


def read_command_line(argv: Sequence[str]) -> tuple[str, config.Options]:
    """The source, which is the first argument, and the options. Raises UserError; --help exits."""
    if not argv or argv[0] in config.HELP or argv[0] == "help":
        config.load("prepare_data", ["--help"])
    source, *args = argv
    if source in SOURCES:
        return source, config.load("prepare_data", args)
    rest = "".join(f" {arg}" for arg in args if arg.isprintable() and quote(arg) == arg)
    if source.startswith("-"):
        advice = f"the source comes first: python -m prepare_data text {quote(source)}{rest}"
    elif os.path.exists(source):
        advice = f"not a source; write python -m prepare_data text --input={quote(source)}{rest}"
    elif (text := " ".join(argv)) != source and os.path.exists(text):
        source, advice = text, f"not a source; write python -m prepare_data text --input={quote(text)}"
    else:
        advice = "no such source" + (did_you_mean(source, SOURCES) or f"; expected one of {', '.join(SOURCES)}")
    raise UserError(f"{source}: {advice}")


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the sample may have characters that the terminal cannot encode
    source, options = read_command_line(sys.argv[1:] if argv is None else argv)
    from prepare_data.pipeline import dry_run, make_corpus, prepare  # with numpy and tiktoken: --help does not wait
    from prepare_data.sources.text import name_of

    for note in options.notes:
        print(note)
    source_options, prepare_options = options.section(SourceOptions), options.section(PrepareOptions)
    given = source_options.input
    if source == "text" and given and not (source_options.name or source_options.dry_run or name_of(given)):
        raise UserError(f"--input={given} has no file name to name the dataset after: add --name=NAME")
    corpus = make_corpus(source, source_options.input, prepare_options)
    if source_options.dry_run:
        dry_run(corpus, prepare_options)
        return 0
    name = source_options.name or (source if source != "text" else folders.safe_name(corpus.name))
    try:
        prepare(corpus, prepare_options, name, source_options.overwrite)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    is_plain = prepare_options.data_dir == "data" and not Path(name).exists()  # train.py takes a path first
    data = name if is_plain else str(Path(prepare_options.data_dir) / name)
    print(f"next: python train.py --data={quote(data)}")
    return 0


if __name__ == "__main__":
    run_script(main)
