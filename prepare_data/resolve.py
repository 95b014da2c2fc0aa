"""--data: which dataset a name or a path means, prepared first where it is text.

A path that exists as given comes before a dataset of that name in data_dir, and before a source of that name. Where
both exist, one line says which is taken and why. Entry points: `resolve_data` for train.py, `training_text` for
what compares a text with that of a run.
"""

import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from common.option import section_from, show
from common.tokenizer import CharTokenizer, Tokenizer
from errors import UserError, quote
from prepare_data import SOURCES, PrepareOptions, folders
from prepare_data.pipeline import build, describe, make_corpus, make_request, open_existing
from prepare_data.shards import Dataset, is_dataset, open_dataset
from prepare_data.sources import Corpus, text
from prepare_data.split import Counts, count

BUILT_IN = SOURCES[1:]
MAX_FILE_NAME = 255  # bytes; systems raise an error for longer ones


Chooser = Callable[[Counts], PrepareOptions]


def resolve_data(
    data: str, options: PrepareOptions, tokenizer: Tokenizer | None = None, flags: Collection[str] = (),
    choose: Chooser | None = None,
) -> Dataset:  # fmt: skip
    """The dataset that --data names: a dataset's folder or name is opened, a text or source is prepared, once.

    `tokenizer`, that of existing weights, takes the place of options.tokenizer. `flags`: options given by the user.
    `choose`: the options of a text that is prepared, by its counts; they take the place of `options`.
    Raises UserError if `data` names nothing, or a dataset that was prepared with another tokenizer.
    """
    try:
        return _resolve(data, options, tokenizer, flags, choose)
    except OSError as error:  # a folder without permission to read it
        raise UserError(f"--data={data}: {error.filename or data} cannot be read ({error.strerror or error})") from None


def training_text(
    data: str | None, recorded: Mapping[str, Any], tokenizer_file: Path, data_dir: str = PrepareOptions.data_dir
) -> Dataset:
    """The dataset that a model was trained on, or the one that `data` names, prepared first where that is text.

    recorded: that of the run, as common.signature.own_texts has it, {} for a model without a run. tokenizer_file: the
    model's, for shards of other programs and for text. Raises UserError, which names the option --data.
    """
    if data is not None:
        options = PrepareOptions(tokenizer=str(tokenizer_file), data_dir=data_dir)
        path, named = Path(data), Path(data_dir) / data
        folder = next((folder for folder in (path, named) if folder.is_dir() and is_dataset(folder)), None)
        dataset = open_dataset(folder, options.tokenizer) if folder else resolve_data(data, options)
        if recorded and dataset.fingerprint != recorded.get("fingerprint"):
            print(f"note: {dataset.folder} is not the dataset that this model was trained on")
        return dataset
    if not recorded.get("path") and not recorded.get("name"):
        raise UserError(
            "it is not known which text this model was trained on: name it with --data=PATH, a dataset or the text"
        )
    found = recorded_dataset(recorded, tokenizer_file, data_dir)
    if found is not None:
        if found.fingerprint == recorded.get("fingerprint"):
            return found
        folder, now, then = found.folder, found.fingerprint, str(recorded.get("fingerprint"))
        raise UserError(
            f"{folder} is no longer the text that this model was trained on (fingerprint {now[:12]}, the run has"
            f" {then[:12]}); to compare with it as it is now, add --data={quote(str(folder))}"
        )
    if not recorded.get("path"):
        raise UserError(
            "this model's run was not made by you on this machine, so the path of its text is not taken from it: name"
            " the text, or a dataset made of it, with --data=PATH"
        )
    raise UserError(
        f"the dataset that this model was trained on, {recorded['path']}, is gone: name its text, or a dataset made of"
        " it, with --data=PATH"
    )


def recorded_dataset(recorded: Mapping[str, Any], tokenizer_file: Path, data_dir: str) -> Dataset | None:
    """The dataset of a state.json: at its path, if it is trusted, else by its name in data_dir. Where neither has its
    tokens, the first one there, with another fingerprint; None where both are gone. Raises UserError on a damaged one.
    """
    places = [Path(recorded["path"])] if recorded.get("path") else []
    places += [Path(data_dir) / recorded["name"]] if recorded.get("name") else []
    found = [open_dataset(place, str(tokenizer_file)) for place in places if place.is_dir() and is_dataset(place)]
    same = [dataset for dataset in found if dataset.fingerprint == recorded.get("fingerprint")]
    return next(iter(same or found), None)


def is_safe_name(data: object) -> bool:
    """Whether --data=DATA means a text of Sprout's own, and no file of this machine."""
    return data in BUILT_IN and not os.path.lexists(str(data))


def _resolve(
    data: str, options: PrepareOptions, tokenizer: Tokenizer | None, flags: Collection[str], choose: Chooser | None
) -> Dataset:
    path = Path(data)
    if not data or any(len(os.fsencode(part)) > MAX_FILE_NAME for part in path.parts):
        raise UserError(_unknown_data(data, options.data_dir))
    named = _dataset_named(data, options)
    if path.is_dir() and is_dataset(path):
        if named:
            print(f"data: the dataset {path} comes before {named}: a path that exists is taken first")
        return _open(path, options, tokenizer, flags)
    if path.exists():
        what = f"the {'folder' if path.is_dir() else 'file'} {path}"
        _refuse_files_of_datasets(path)
        difference = _difference(named, data, options, tokenizer, flags) if named else ""
        if named and not difference:
            print(f"data: {named} is taken: it was prepared from {what} as that is now")
            return _open(named, options, tokenizer, flags)
        if named:
            print(f"data: {what} is taken: a path that exists comes before the dataset {named}, {difference}")
            print(f"  for that dataset: --data={quote(str(named))}")
        elif data in BUILT_IN:
            print(f"data: {what} is taken: a path that exists comes before Sprout's own text of that name")
        return _prepare(data, make_corpus("text", data, options), options, tokenizer, choose)
    if named and not re.match(r"\.[/\\]", data):
        return _open(named, options, tokenizer, flags)
    if text.exists(data):  # a glob
        return _prepare(data, make_corpus("text", data, options), options, tokenizer, choose)
    if data in BUILT_IN:
        return _prepare(data, make_corpus(data, None, options), options, tokenizer, choose)
    raise UserError(_unknown_data(data, options.data_dir))


def _dataset_named(data: str, options: PrepareOptions) -> Path | None:
    """The dataset of that name in data_dir, if it is not the path itself."""
    folder, path = Path(options.data_dir) / data, Path(data)
    if not path.parts or ".." in path.parts or not folder.is_dir() or not is_dataset(folder):
        return None
    return None if path.exists() and path.samefile(folder) else folder


def _refuse_files_of_datasets(path: Path) -> None:
    """Raises UserError for a file of a dataset, and for a folder of datasets: neither is text."""
    if path.is_file() and (path.suffix in (".bin", ".npy") or path.name == "dataset.json") and is_dataset(path.parent):
        raise UserError(f"--data={path}: is a file of a dataset; give its folder: --data={path.parent}")
    subfolders = [folder for folder in path.glob("[!.]*") if folder.is_dir()] if path.is_dir() else []
    inside = sorted(folder.name for folder in subfolders if is_dataset(folder))
    if inside:
        raise UserError(
            f"--data={path}: a folder of datasets ({', '.join(inside[:5])}); give one of them:"
            f" --data={quote(str(path / inside[0]))}"
        )


def _difference(
    named: Path, data: str, options: PrepareOptions, tokenizer: Tokenizer | None, flags: Collection[str]
) -> str:
    """Why a dataset is not what `data`, a text, would be prepared to; empty if it is."""
    if text.name_of_pipe(data):
        return "which was not prepared from it"
    try:
        dataset = open_dataset(named)
        stored = section_from(PrepareOptions, {**dataset.meta["options"], "data_dir": options.data_dir})
        content = dataset.meta["request"]["content"]
        is_same = content == count(make_corpus("text", data, stored), alphabet=False, quiet=True).content
    except (UserError, ValueError, KeyError, TypeError):  # damaged, not prepared here, or the text cannot be read so
        return "which was not prepared from it"
    if not is_same:
        return "which was prepared from other text"
    if tokenizer and tokenizer.content_hash != dataset.tokenizer.content_hash:
        return f"which has another tokenizer ({dataset.tokenizer.name}) than the model"
    names = [field.name for field in fields(PrepareOptions) if field.name in flags]
    changed = [name for name in names if getattr(stored, name) != getattr(options, name)]
    return f"which was prepared with another --{changed[0]} ({getattr(stored, changed[0])})" if changed else ""


def _open(folder: Path, options: PrepareOptions, tokenizer: Tokenizer | None, flags: Collection[str]) -> Dataset:
    """Opens and logs a dataset. Raises UserError if its tokenizer is not that of the weights to be trained, and on a
    flag that it was not prepared with."""
    dataset = open_dataset(folder, options.tokenizer)
    stored = dataset.meta.get("options")
    stored = stored if isinstance(stored, dict) else {}  # the shards of other programs have none
    for name, value in asdict(options).items():
        is_given = name in flags and name not in ("tokenizer", "data_dir")
        if is_given and json.dumps(stored.get(name)) != json.dumps(value):
            before = f", with {name}={show(stored[name])}" if name in stored else ""
            raise UserError(
                f"--{name}={show(value)}: {folder} is prepared already{before};"
                " leave the flag out, or give --data the text itself"
            )
    own = dataset.tokenizer
    if tokenizer and tokenizer.content_hash != own.content_hash:
        raise UserError(
            f"{dataset.folder} was prepared with the tokenizer {own.name}"
            f" ({own.vocab_size} ids, {own.content_hash[:8]}), but the model has"
            f" {tokenizer.name} ({tokenizer.vocab_size} ids, {tokenizer.content_hash[:8]}); give --data the text itself"
        )
    log_dataset(dataset)
    if not tokenizer and options.tokenizer not in ("bpe", own.name):
        print(f"data: tokenizer={options.tokenizer} has no effect: the dataset was prepared with {own.name}")
    return dataset


def log_dataset(dataset: Dataset, prefix: str = "") -> None:
    """Prints what was opened, and whether it is checked while the training runs."""
    print(f"data: {prefix}{dataset.folder} ({describe(dataset)})")
    for note in dataset.meta.get("notes", []):
        print(f"data: {note}")
    checks = [split.check for split in (dataset.train, dataset.val) if split.check.in_background]
    if checks:
        print(f"data: {sum(check.bytes for check in checks) / 1e9:.1f} GB are checked for damage in the background")


def _prepare(
    data: str, corpus: Corpus, options: PrepareOptions, tokenizer: Tokenizer | None, choose: Chooser | None
) -> Dataset:
    """The dataset of a text in data_dir/NAME-KEY, which is written only once."""
    counts = count(corpus, options.tokenizer == "char" or choose is not None or isinstance(tokenizer, CharTokenizer))
    if isinstance(tokenizer, CharTokenizer):
        _refuse_unknown_characters(data, corpus, counts, tokenizer)
    options = choose(counts) if choose else options
    request = make_request(counts, options, tokenizer)
    key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:8]
    final = Path(options.data_dir) / f"{folders.safe_name(corpus.name[:60])}-{key}"
    existing = open_existing(final, request)
    if existing:
        log_dataset(existing, f"{data}, already prepared in ")
        return existing
    print(f"data: preparing {data} in {final}")
    return build(corpus, counts, options, request, final, tokenizer)


def _refuse_unknown_characters(data: str, corpus: Corpus, counts: Counts, tokenizer: CharTokenizer) -> None:
    """Raises UserError where the text has characters that a model's tokenizer does not know, and says how many."""
    unknown = counts.alphabet - set(tokenizer.chars)
    if not unknown:
        return
    found = Counter(char for piece, _ in corpus.pieces() for char in piece if char in unknown)
    shown = ", ".join(f"{char!r} ({n:,})" for char, n in found.most_common(5))
    more = f" and {len(found) - 5:,} more" if len(found) > 5 else ""
    share = found.total() / counts.characters
    raise UserError(
        f"--data={data}: the model's char tokenizer knows {len(tokenizer.chars)} characters, and {found.total():,} of "
        f"the text's {counts.characters:,} ({share:.2%}) are others: {shown}{more}. Replace or remove them, or train a "
        "new model with --tokenizer=bpe or bytes, which know every character"
    )


def _unknown_data(data: str, data_dir: str) -> str:
    known = sorted(folder.name for folder in Path(data_dir).glob("[!.]*") if is_dataset(folder))
    matches = difflib.get_close_matches(data, [*known, *BUILT_IN], n=1)
    return (
        f"--data={show(data)}: no dataset, file or folder of that name in {Path.cwd()}, and no dataset in {data_dir}/"
        + (f"; did you mean {matches[0]}?" if matches else ".")
        + f" Datasets there: {', '.join(known) or 'none'}."
        + f" Expected a dataset, a text file or folder, or {' or '.join(BUILT_IN)}"
    )
