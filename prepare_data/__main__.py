"""python -m prepare_data SOURCE [--option=value …]: writes a dataset; with --dry_run, describes it. See pipeline.py."""

from errors import UserError, run_script, start_script

if __name__ == "__main__":
    start_script()  # before the imports that take seconds

import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import config
from common.option import did_you_mean
from prepare_data import PrepareOptions, SourceOptions, folders
from prepare_data.pipeline import SOURCES, dry_run, make_corpus, prepare


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the sample may have characters that the terminal cannot encode
    if not argv or argv[0] in ("--help", "-h"):
        config.load("prepare_data", ["--help"])
    source, *args = argv
    options = config.load("prepare_data", args)
    if source not in SOURCES:
        hint = did_you_mean(source, SOURCES) or f"; expected one of {', '.join(SOURCES)}"
        raise UserError(f"{source}: no such source{hint}")
    for note in options.notes:
        print(note)
    source_options, prepare_options = options.section(SourceOptions), options.section(PrepareOptions)
    if source_options.input == "-" and not source_options.name and not source_options.dry_run:
        raise UserError("--input=- has no file name to name the dataset after: add --name=NAME")
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
    print(f"next: python train.py --data={shlex.quote(data)}")
    return 0


if __name__ == "__main__":
    run_script(main)
