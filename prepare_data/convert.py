"""python -m prepare_data convert: the token shards of other programs → a dataset, and a dataset → their shards.

Both read through `open_dataset`, check everything that they read first, and write a folder under a temporary name that
is renamed when it is complete. Entry points: `convert_in`, `convert_out`. Formats: foreign.py, foreign_writer.py.

A dataset here is EOS doc EOS … doc EOS. Elsewhere documents only end with EOS, or only begin with it, so one EOS of a
split is missing, at its front or its end. Where a document is cut between train and val, none belongs: `boundaries`.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from errors import UserError, quote
from files import sync_directory
from prepare_data import folders
from prepare_data.foreign_writer import TARGETS, ForeignFile, Ids, Target, files_for
from prepare_data.pipeline import describe
from prepare_data.shard_check import MAX_AT_ONCE
from prepare_data.shard_format import SPLITS
from prepare_data.shard_writer import ShardWriter, write_dataset
from prepare_data.shards import Dataset, is_dataset, open_dataset
from terminal import progress_bar


def convert_in(
    data: str, tokenizer: str, data_dir: Path, name: str | None, shard_tokens: int, overwrite: bool = False
) -> Dataset:
    """Writes the dataset data_dir/NAME from a folder of shards, or returns the one that is there, if it is the same.

    data: the folder. name: None takes the folder's. Raises UserError.
    """
    folder = find_input(data, data_dir)
    if (folder / "dataset.json").is_file():
        raise UserError(
            f"--input={data}: is a Sprout dataset; to write it for another program: python -m prepare_data convert"
            f" --input={quote(data)} --to=nanogpt --out=DIR"
        )
    final = data_dir / (folders.check_name(name) if name else folders.safe_name(folder.resolve().name))
    source = _open(folder, tokenizer)
    splits = boundaries(source)
    if final.exists() and final.samefile(folder):
        raise UserError(f"{final}: is the folder to be converted; choose another --name")
    if final.exists() and not (final / "dataset.json").is_file():
        raise UserError(f"{final}: exists but is not a Sprout dataset; choose another --name, or delete it")
    if final.exists() and not overwrite:
        return _open_equal(final, source, splits, shard_tokens)
    write = partial(_write_dataset, source=source, splits=splits, shard_tokens=shard_tokens)
    if not _write_and_rename(final, write, overwrite, "--data_dir"):
        return _open_equal(final, source, splits, shard_tokens)
    dataset = open_dataset(final)
    documents = sum(entry["documents"] for split in SPLITS for entry in dataset.meta["shards"][split])
    print(f"converted {folder} → {final}: {describe(dataset)}; {documents:,} documents")
    print(f"  {describe_change(splits)}")
    return dataset


def convert_out(
    data: str, tokenizer: str | None, data_dir: Path, to: str, out: Path, shard_tokens: int, overwrite: bool = False
) -> None:
    """Writes a dataset, or the shards of another program, as the shards of `to`, one of TARGETS, in the folder `out`.

    tokenizer: of shards; a dataset has its own, so it must be None then. Raises UserError.
    """
    target, folder, final = TARGETS[to], find_input(data, data_dir), out.resolve()
    is_own = (folder / "dataset.json").is_file()
    if is_own and tokenizer is not None:
        raise UserError(f"--tokenizer={tokenizer} has no effect: {folder} has its own tokenizer; leave the flag out")
    dataset = _open(folder, tokenizer)
    _refuse_unfit(dataset, target)
    splits = with_convention(dataset, target, {} if is_own else boundaries(dataset))
    files = files_for(target, splits, shard_tokens)
    if not _is_free(out, final, folder) and not overwrite:
        _check_equal(final, files)
        print(f"{out}: already converted ({_sizes(splits)})")
        return
    if final.exists():
        _refuse_other_files(final)
    if not _write_and_rename(final, partial(_write_files, files=files), final.exists(), "--out"):
        _check_equal(final, files)
    last = f" … {files[-1].name}" if len(files) > 2 else f", {files[-1].name}"
    print(f"converted {folder} → {out} for {target.program}: {files[0].name}{last} ({_sizes(splits)})")
    print(f"  {describe_change(splits)}")
    print(f"  {_advice(target, dataset)}")


def find_input(data: str, data_dir: Path) -> Path:
    """The folder of a dataset or of shards that a path or a dataset's name means. Raises UserError."""
    path = Path(data)
    try:
        for folder in (path, data_dir / data):
            if data and folder.is_dir() and is_dataset(folder):
                return folder
        if path.is_file() and is_dataset(path.parent):
            raise UserError(f"--input={data}: is a file of a dataset; give its folder: --input={path.parent}")
        exists = path.exists()
    except OSError as error:
        raise UserError(f"--input={data}: cannot be read ({error.strerror or error})") from None
    expected = (
        "expected a dataset, or a folder with train.bin and val.bin, with shards such as fineweb_train_000001.bin and"
        " fineweb_val_000000.bin, or with .npy files of such names"
    )
    if not exists:
        raise UserError(f"--input={data}: no such folder, and no dataset of that name in {data_dir}/; {expected}")
    raise UserError(
        f"--input={data}: neither a dataset nor token shards: {expected}. Text becomes a dataset with"
        f" python -m prepare_data text --input={quote(data)}"
    )


def _open(folder: Path, tokenizer: str | None) -> Dataset:
    """The opened dataset, all of whose checksums and ids are right. Raises UserError."""
    dataset = open_dataset(folder, tokenizer)
    for note in dataset.meta.get("notes", []):
        print(f"note: {note}")
    checks = [dataset.train.check, dataset.val.check]
    if (size := sum(check.bytes for check in checks)) > MAX_AT_ONCE:
        print(f"checking {folder}: {size / 1e9:.1f} GB", flush=True)
    for check in checks:
        check.complete()
    return dataset


def boundaries(dataset: Dataset) -> dict[str, Ids]:
    """The splits of shards, with the EOS that this format has and theirs leaves out.

    A split lacks one in front where the other one ends with EOS, and one at its end where the other begins with EOS;
    otherwise its first document began, or its last one goes on, in the other split. So whole documents get theirs in
    either convention, FineWeb's train split, which goes on where val ends, gets none in front, a text without EOS none.
    """
    eos_id, splits = dataset.tokenizer.eos_id, (dataset.train, dataset.val)
    begins = [int(split.read(0, 1)[0]) == eos_id for split in splits]
    ends = [int(split.read(len(split) - 1, 1)[0]) == eos_id for split in splits]
    return {
        split.name: Ids(split, eos_id, int(not begins[i] and ends[1 - i]), int(not ends[i] and begins[1 - i]))
        for i, split in enumerate(splits)
    }


def with_convention(dataset: Dataset, target: Target, added: Mapping[str, Ids]) -> dict[str, Ids]:
    """The splits without the EOS that a program's documents do not have: the last one where they begin with EOS, else
    the first one. added: what `boundaries` added to them, {} for a dataset. Raises UserError if nothing is left."""
    eos_id, found = dataset.tokenizer.eos_id, {}
    for split in (dataset.train, dataset.val):
        ids = added.get(split.name, Ids(split, eos_id))
        front, back = ids.front, ids.back
        if target.eos_first:
            back -= back == 1 or int(split.read(len(split) - 1, 1)[0]) == eos_id
        else:
            front -= front == 1 or int(split.read(0, 1)[0]) == eos_id
        found[split.name] = Ids(split, eos_id, front, back)
        if len(found[split.name]) < 2:
            raise UserError(f"{dataset.folder}: the {split.name} split has no text, which {target.program} cannot read")
    return found


def describe_change(splits: Mapping[str, Ids]) -> str:
    """What was added to the ids of the splits and dropped from them, for the console."""
    parts = []
    for word, change in (("added", 1), ("dropped", -1)):
        for place, attribute in (("at the beginning", "front"), ("at the end", "back")):
            names = [name for name, ids in splits.items() if getattr(ids, attribute) == change]
            parts += [f"{word} one end-of-sequence {place} of {' and of '.join(names)}"] if names else []
    return "; ".join(parts) if parts else "the ids are the same, none added or dropped"


def _refuse_unfit(dataset: Dataset, target: Target) -> None:
    """Raises UserError for what a program's files cannot hold."""
    if dataset.train.masked or dataset.val.masked:
        raise UserError(
            f"{dataset.folder}: has loss masks, which {target.program}'s files cannot hold: it would train on the"
            " masked tokens too; prepare the text again without what is masked"
        )
    size = dataset.tokenizer.vocab_size
    if target.dtype == "uint16" and size > 65_536:
        raise UserError(
            f"{dataset.folder}: {target.program}'s ids have 16 bits, which {size:,} ids do not fit in"
            f" ({dataset.tokenizer.name}); --to=llmc-uint32 has 32, or prepare the text with a smaller vocabulary"
        )


def _is_free(out: Path, final: Path, source: Path) -> bool:
    """Whether the folder to be made does not exist or is empty. Raises UserError where it can never be replaced."""
    try:
        if not final.exists():
            return True
        if not final.is_dir() or final.samefile(source) or final.samefile("."):
            raise UserError(
                f"--out={out}: is a file, the folder to be converted or the current folder; choose another one"
            )
        return not any(final.iterdir())
    except OSError as error:
        raise UserError(f"--out={out}: cannot be used ({error.strerror or error}); choose another one") from None


def _refuse_other_files(final: Path) -> None:
    """Raises UserError where a folder has anything but files that `convert_out` writes: it is not replaced then."""
    known = list(TARGETS.values())
    others = sorted(path.name for path in final.iterdir() if not any(target.is_file(path.name) for target in known))
    if others:
        raise UserError(
            f"{final}: is not overwritten, because it has more than shards: {', '.join(others[:3])}; choose another"
            " --out, or move these away"
        )


def _check_equal(final: Path, files: Sequence[ForeignFile]) -> None:
    """Raises UserError where a folder does not have exactly these files of this kind."""
    found = {path.name for path in final.iterdir() if files[0].target.is_file(path.name)}
    with progress_bar("comparing", sum(file.size for file in files)) as bar:
        is_same = found == {file.name for file in files} and all(file.is_in(final, bar.update) for file in files)
    if not is_same:
        raise UserError(
            f"{final}: exists and has other content; choose another --out, or replace it with --overwrite=true"
        )


def _open_equal(final: Path, source: Dataset, splits: Mapping[str, Ids], shard_tokens: int) -> Dataset:
    """The existing dataset, if it is what the source is converted to. Raises UserError otherwise."""
    existing = open_dataset(final)
    is_same = existing.tokenizer.content_hash == source.tokenizer.content_hash
    for split in (existing.train, existing.val):
        ids = splits[split.name]
        sizes = [min(shard_tokens, len(ids) - start) for start in range(0, len(ids), shard_tokens)]
        is_same = is_same and not split.masked and [shard.tokens for shard in split.shards] == sizes
        if is_same:
            blocks = zip(ids.blocks(0, len(ids)), Ids(split, ids.eos_id).blocks(0, len(ids)), strict=True)
            is_same = all(np.array_equal(one, other) for one, other in blocks)
    if not is_same:
        raise UserError(
            f"{final}: the existing dataset has other content; choose another --name, or replace it with"
            " --overwrite=true"
        )
    print(f"{final}: already converted ({describe(existing)})")
    return existing


def _write_dataset(folder: Path, source: Dataset, splits: Mapping[str, Ids], shard_tokens: int) -> None:
    writers = {split: ShardWriter(folder, split, source.tokenizer, shard_tokens) for split in splits}
    try:
        with progress_bar("converting", sum(map(len, splits.values())), unit=" tokens") as bar:
            for split, ids in splits.items():
                for block in ids.blocks(0, len(ids)):
                    writers[split].append(block)
                    bar.update(len(block))
        shards = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abort()
    origin = {"name": "shards of another program", "folder": source.folder.resolve().name}
    write_dataset(folder, source.tokenizer, shards, {"source": origin})


def _write_files(folder: Path, files: Sequence[ForeignFile]) -> None:
    with progress_bar("converting", sum(file.size for file in files)) as bar:
        for file in files:
            file.write(folder, bar.update)


def _write_and_rename(final: Path, write: Callable[[Path], object], replaces: bool, option: str) -> bool:
    """Makes the folder `final` with what `write` writes into it. False if another process made one in the meantime.

    Raises UserError if the disk fails; nothing is left behind then.
    """
    folder = None
    try:
        folders.clean(final.parent)
        folder = folders.temporary(final.parent)
        write(folder)
        sync_directory(folder)
        if replaces and final.exists():
            folders.replace(folder, final)
            return True
        return folders.publish(folder, final)
    except OSError as error:
        raise UserError(
            f"{final}: cannot be written ({error}); nothing was changed: free disk space or choose another {option}"
        ) from None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def _sizes(splits: Mapping[str, Ids]) -> str:
    return f"{len(splits['train']):,} + {len(splits['val']):,} tokens"


def _advice(target: Target, dataset: Dataset) -> str:
    """What has to be set in the other program."""
    tokenizer = dataset.tokenizer
    if tokenizer.name == "gpt2" and target.dtype == "uint16":
        return f"{target.program} expects gpt2's ids: nothing has to be set for them"
    size = tokenizer.vocab_size
    enough = f"enough; for exactly {size}, set {target.setting}"
    too_few = f"too few: set {target.setting} to {size}"
    return (
        f"these are {size:,} ids of {tokenizer.name}, end-of-sequence {tokenizer.eos_id}; {target.program}'s model has"
        f" {target.rows:,}, {enough if target.rows >= size else too_few}"
    )
