"""python -m prepare_data SOURCE [--option=value …]: writes a dataset; with --dry_run, describes it. See pipeline.py.

With `convert` as the source: a dataset from the token shards of another program, or the other way. See convert.py.
"""

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
from prepare_data import SOURCES, ConvertOptions, PrepareOptions, SourceOptions, folders

COMMANDS = (*SOURCES, "convert")
FOR_CONVERT = {"to", "out"}
WITH_CONVERT = {*FOR_CONVERT, "input", "name", "overwrite", "tokenizer", "shard_tokens", "data_dir"}


def read_command_line(argv: Sequence[str]) -> tuple[str, config.Options]:
    """The source, which is the first argument, and the options. Raises UserError; --help exits."""
    if not argv or argv[0] in config.HELP or argv[0] == "help":
        config.load("prepare_data", ["--help"])
    source, *args = argv
    if source in COMMANDS:
        options = config.load("prepare_data", args)
        refuse_unused(source, options)
        return source, options
    rest = "".join(f" {arg}" for arg in args if arg.isprintable() and quote(arg) == arg)
    if source.startswith("-"):
        advice = f"the source comes first: python -m prepare_data text {quote(source)}{rest}"
    elif os.path.exists(source):
        advice = f"not a source; write python -m prepare_data text --input={quote(source)}{rest}"
    elif (text := " ".join(argv)) != source and os.path.exists(text):
        source, advice = text, f"not a source; write python -m prepare_data text --input={quote(text)}"
    else:
        advice = "no such source" + (did_you_mean(source, COMMANDS) or f"; expected one of {', '.join(COMMANDS)}")
    raise UserError(f"{source}: {advice}")


def refuse_unused(source: str, options: config.Options) -> None:
    """Raises UserError on flags that have no effect with this source."""
    flags = [name for name, origin in options.origin.items() if origin == "flag" and options.values[name] is not None]
    to, where = options.values["to"], source
    unused = [name for name in flags if (name not in WITH_CONVERT if source == "convert" else name in FOR_CONVERT)]
    if source == "convert" and to:
        extra = {"name", "shard_tokens"} if to == "nanogpt" else {"name"}  # nanoGPT has one file for each split
        unused, where = unused + [name for name in flags if name in extra], f"convert --to={to}"
    if unused:
        names = " and ".join(f"--{name}" for name in unused)
        raise UserError(f"{names}: no effect with {where}; leave {'it' if len(unused) == 1 else 'them'} out")


def convert(options: config.Options) -> str | None:
    """Converts in one of the two directions. Returns the name of the dataset that was made, None for --to."""
    from prepare_data.convert import convert_in, convert_out

    source, target = options.section(SourceOptions), options.section(ConvertOptions)
    prepare_options = options.section(PrepareOptions)
    if source.input is None:
        raise UserError("convert needs --input=FOLDER, the shards of another program or a dataset")
    data_dir, tokenizer = Path(prepare_options.data_dir), prepare_options.tokenizer
    shard_tokens, overwrite = prepare_options.shard_tokens, source.overwrite
    if target.to is None:
        return convert_in(source.input, tokenizer, data_dir, source.name, shard_tokens, overwrite).name
    assert target.out is not None
    given = tokenizer if options.origin["tokenizer"] == "flag" else None
    convert_out(source.input, given, data_dir, target.to, Path(target.out), shard_tokens, overwrite)
    return None


def main(argv: Sequence[str] | None = None) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the sample may have characters that the terminal cannot encode
    source, options = read_command_line(sys.argv[1:] if argv is None else argv)
    for note in options.notes:
        print(note)
    try:
        name = convert(options) if source == "convert" else prepare_text(source, options)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    if name is not None:
        data_dir = options.section(PrepareOptions).data_dir
        is_plain = data_dir == "data" and not Path(name).exists()  # train.py takes a path first
        print(f"next: python train.py --data={quote(name if is_plain else str(Path(data_dir) / name))}")
    return 0


def prepare_text(source: str, options: config.Options) -> str | None:
    """Prepares or describes a source of text. Returns the name of the dataset, None for a dry run."""
    from prepare_data.pipeline import dry_run, make_corpus, prepare  # with numpy and tiktoken: --help does not wait
    from prepare_data.sources.text import name_of

    source_options, prepare_options = options.section(SourceOptions), options.section(PrepareOptions)
    given = source_options.input
    if source == "text" and given and not (source_options.name or source_options.dry_run or name_of(given)):
        raise UserError(f"--input={given} has no file name to name the dataset after: add --name=NAME")
    corpus = make_corpus(source, source_options.input, prepare_options)
    if source_options.dry_run:
        dry_run(corpus, prepare_options)
        return None
    name = source_options.name or (source if source != "text" else folders.safe_name(corpus.name))
    prepare(corpus, prepare_options, name, source_options.overwrite)
    return name


if __name__ == "__main__":
    run_script(main)
