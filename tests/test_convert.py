"""python -m prepare_data convert: the bytes that other programs read, the way back, and what is refused."""

import json
import os
import struct
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import train
from common.tokenizer import Tokenizer, bytes_tokenizer
from errors import UserError
from prepare_data import convert, folders, foreign_writer
from prepare_data.__main__ import main
from prepare_data.shard_writer import ShardWriter, write_dataset
from prepare_data.shards import open_dataset

EOS = 256
FORMATS = {  # --to: (the first train file, the first val file)
    "nanogpt": ("train.bin", "val.bin"),
    "llmc": ("fineweb_train_000001.bin", "fineweb_val_000000.bin"),
    "llmc-uint32": ("fineweb_train_000001.bin", "fineweb_val_000000.bin"),
    "modded-nanogpt": ("fineweb_train_000001.bin", "fineweb_val_000000.bin"),
    "build-nanogpt": ("edufineweb_train_000001.npy", "edufineweb_val_000000.npy"),
}
EOS_LAST = {"nanogpt"}
SMALL = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --tokens_per_step=64 --warmup_steps=1 --max_steps=2"
QUICK = "--patience=none --budget_minutes=none --eval_tokens=100 --sample_tokens=3 --final_samples=1 --threads=1"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder with a space and non-ASCII letters in its name."""
    folder = tmp_path / "my wörk 文"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def make(name, train, val, tokenizer=None, shard_tokens=1000, masked=False):
    """The dataset data/NAME of these ids, with the EOS that they have."""
    place, tokenizer, shards = Path("data", name), tokenizer or bytes_tokenizer(), {}
    place.mkdir(parents=True)
    for split, ids in (("train", train), ("val", val)):
        writer = ShardWriter(place, split, tokenizer, shard_tokens, masked)
        writer.append(np.asarray(ids, dtype=np.int64))
        shards[split] = writer.close()
    write_dataset(place, tokenizer, shards, {"source": {"name": "test"}})
    return open_dataset(place)


def documents(*texts):
    """EOS text EOS text … EOS."""
    return [EOS, *(i for text in texts for i in [*text.encode(), EOS])]


def notes():
    return make("notes", documents(*(f"note number {i}" * 3 for i in range(40))), documents("one", "two" * 40))


def run(*flags):
    return main(["convert", *flags])


def there_and_back(to, *flags):
    """Converts notes with --to, and back to a dataset of that name."""
    flags = [*flags] if to == "nanogpt" else [*flags, "--shard_tokens=400"]
    assert run("--input=notes", f"--to={to}", f"--out=other programs/{to}", *flags) == 0
    assert run(f"--input=other programs/{to}", f"--name={to}", "--tokenizer=bytes", "--shard_tokens=1000") == 0
    return open_dataset(f"data/{to}")


def read(path, to):
    """The ids of a file, as the program reads it."""
    if to == "nanogpt":
        return np.fromfile(path, "<u2").tolist()
    if to == "build-nanogpt":
        ids = np.load(path, allow_pickle=False)
        assert ids.dtype == np.uint16
        return ids.tolist()
    dtype, magic, version = ("<u4", 20240801, 7) if to == "llmc-uint32" else ("<u2", 20240520, 1)
    header = struct.unpack("<256i", path.read_bytes()[:1024])
    ids = np.fromfile(path, dtype, offset=1024)
    assert header == (magic, version, len(ids), *[0] * 253)
    return ids.tolist()


def ids_of(split):
    return split.read(0, len(split)).tolist()


def files_under(place):
    return sorted(file.relative_to(place).as_posix() for file in Path(place).rglob("*"))


# ---- what is written


@pytest.mark.parametrize("to", FORMATS)
def test_files_and_ids_as_the_program_reads_them_and_the_way_back(to, capsys):
    own = notes()
    back = there_and_back(to)
    for split, name in zip((own.train, own.val), FORMATS[to], strict=True):
        start = name.partition("_0000")[0]
        paths = sorted(path for path in Path("other programs", to).iterdir() if path.name.startswith(start))
        assert paths[0].name == name
        ids = [i for path in paths for i in read(path, to)]
        assert ids == (ids_of(split)[1:] if to in EOS_LAST else ids_of(split)[:-1])
        sizes = [len(read(path, to)) for path in paths]
        assert len(sizes) == 1 if to == "nanogpt" else max(sizes) <= 400
        assert max(sizes) - min(sizes) <= 1, "no short file at the end"
    assert back.fingerprint == own.fingerprint
    assert [ids_of(split) for split in (back.train, back.val)] == [ids_of(split) for split in (own.train, own.val)]
    counts = [[entry["documents"] for entry in dataset.meta["shards"]["train"]] for dataset in (own, back)]
    assert counts[0] == counts[1]
    assert sum(counts[0]) == 40
    place = "beginning" if to in EOS_LAST else "end"
    out = capsys.readouterr().out
    assert f"dropped one end-of-sequence at the {place} of train and of val" in out
    assert f"added one end-of-sequence at the {place} of train and of val" in out
    assert "42 documents" in out
    assert f"next: python train.py --data={to}\n" in out


@pytest.mark.parametrize("to", FORMATS)
def test_training_on_the_files_and_on_what_they_are_converted_to(to):
    notes()
    there_and_back(to)
    for data in (f"other programs/{to}", f"data/{to}"):
        flags = [f"--data={data}", *(["--tokenizer=bytes"] if " " in data else []), "--run=run " + data[:4]]
        assert train.main(["quickstart", *flags, *SMALL.split(), *QUICK.split()]) == 0
    assert len(list(Path().glob("run */checkpoints/*2/manifest.json"))) == 2


@pytest.mark.parametrize("to", FORMATS)
def test_a_document_that_is_cut_between_the_splits_stays_cut(to):
    train, val = documents("whole", "from tr"), documents("ain to val", "last")
    own = make("notes", train[:-1], val[1:])
    assert there_and_back(to).fingerprint == own.fingerprint


@pytest.mark.parametrize(
    ("train", "val", "added"),
    [
        ("a.b.", "c.d.", (".a.b.", ".c.d.")),  # nanoGPT
        (".a.b", ".c.d", (".a.b.", ".c.d.")),  # llm.c
        (".a.b.", ".c.", (".a.b.", ".c.")),  # ours
        ("est.a.b", ".c.r", ("est.a.b.", ".c.r")),  # FineWeb: train goes on where val ends
        ("abc", "def", ("abc", "def")),  # one text, cut
    ],
)
def test_which_end_of_sequence_is_added(train, val, added, capsys):
    Path("nano").mkdir()
    for name, text in (("train", train), ("val", val)):
        np.array([EOS if letter == "." else ord(letter) for letter in text], "<u2").tofile(f"nano/{name}.bin")
    assert run("--input=nano", "--tokenizer=bytes") == 0
    made = open_dataset("data/nano")
    found = ["".join("." if i == EOS else chr(i) for i in ids_of(split)) for split in (made.train, made.val)]
    assert tuple(found) == added
    assert ("none added" in capsys.readouterr().out) == (added == (train, val))


def test_from_one_program_to_another():
    notes()
    for to, flags in (("nanogpt", ["--input=notes"]), ("llmc", ["--input=a/nanogpt", "--tokenizer=bytes"])):
        assert run(*flags, f"--to={to}", f"--out=a/{to}") == 0
    assert run("--input=notes", "--to=llmc", "--out=a/direct") == 0
    for name in FORMATS["llmc"]:
        assert Path("a/llmc", name).read_bytes() == Path("a/direct", name).read_bytes()


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_of_any_size(block, monkeypatch):
    monkeypatch.setattr(foreign_writer, "BLOCK", block)
    own = notes()
    assert there_and_back("llmc").fingerprint == own.fingerprint


def large_tokenizer(size):
    tokens = [bytes([i]) for i in range(256)] + [bytes([i, j, 0]) for i in range(256) for j in range(256)]
    return Tokenizer("bpe", "gpt2", [*tokens[: size - 1], None], size - 1)


@pytest.mark.parametrize(("size", "fits"), [(65_536, True), (65_537, False)])
@pytest.mark.parametrize("to", FORMATS)
def test_a_large_vocabulary_needs_32_bits(to, size, fits):
    own = make("notes", [size - 1, 65_000, size - 1], [size - 1, 5, 6, size - 1], large_tokenizer(size))
    flags = ["--input=notes", f"--to={to}", f"--out={to}"]
    if not fits and to != "llmc-uint32":
        with pytest.raises(UserError, match=r"16 bits, which 65,537 ids do not fit in \(bpe\); --to=llmc-uint32"):
            run(*flags)
        assert not Path(to).exists()
        return
    assert run(*flags) == 0
    tokenizer = "--tokenizer=data/notes/dataset.json"
    assert run(f"--input={to}", tokenizer, "--name=back", "--shard_tokens=1000") == 0
    assert open_dataset("data/back").fingerprint == own.fingerprint


def test_what_has_to_be_set_in_the_other_program(capsys):
    small = make("small", documents("abc"), documents("def"))
    make("large", [60_000, 5, 6, 60_000], [60_000, 5, 6, 60_000], large_tokenizer(60_001))
    run("--input=small", "--to=nanogpt", "--out=a")
    assert (
        "257 ids of bytes, end-of-sequence 256; nanoGPT's model has 50,304, enough; for exactly 257, set meta_vo"
        in (capsys.readouterr().out)
    )
    run("--input=large", "--to=nanogpt", "--out=b")
    assert "has 50,304, too few: set meta_vocab_size in its train.py to 60001" in capsys.readouterr().out
    assert files_under("a") == ["train.bin", "val.bin"], "no pickle"
    tokenizer = small.tokenizer
    make("gpt2", documents("a"), documents("b"), Tokenizer("gpt2", "gpt2", [*tokenizer.token_bytes[:256], None], 256))
    run("--input=gpt2", "--to=nanogpt", "--out=c")
    assert "nanoGPT expects gpt2's ids: nothing has to be set" in capsys.readouterr().out


# ---- a second run, and what exists already


def test_a_second_run_says_that_it_is_there_and_changes_nothing(capsys):
    notes()
    there_and_back("llmc")
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    capsys.readouterr()
    there_and_back("llmc")
    assert capsys.readouterr().out.count("already converted") == 2
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before


def test_other_content_is_replaced_only_with_overwrite():
    notes()
    back = there_and_back("llmc")
    make("other", documents("quite another text"), documents("and its val"))
    for flags, match in (
        (["--input=other", "--to=llmc", "--out=other programs/llmc"], "exists and has other content;.*--overwrite"),
        (["--input=notes", "--to=llmc", "--out=other programs/llmc"], "exists and has other content"),  # one file each
        (["--input=other programs/llmc", "--tokenizer=bytes", "--name=other"], "existing dataset has other content"),
        (["--input=other programs/llmc", "--tokenizer=bytes", "--name=llmc", "--shard_tokens=99"], "other content"),
    ):
        with pytest.raises(UserError, match=match):
            run(*flags)
    assert run("--input=other programs/llmc", "--tokenizer=bytes", "--name=other", "--overwrite=true") == 0
    assert ids_of(open_dataset("data/other").train) == ids_of(back.train)
    assert run("--input=notes", "--to=llmc", "--out=other programs/llmc", "--overwrite") == 0
    assert files_under("other programs/llmc") == list(FORMATS["llmc"])
    assert sorted(os.listdir("other programs") + os.listdir("data")) == ["llmc", "llmc", "notes", "other"]


def test_a_damaged_result_is_not_called_converted():
    notes()
    there_and_back("build-nanogpt")
    stale = Path("other programs/build-nanogpt/edufineweb_train_000099.npy")  # the loader would read it
    stale.write_bytes(b"")
    with pytest.raises(UserError, match="has other content"):
        there_and_back("build-nanogpt")
    stale.unlink()
    path = Path("other programs/build-nanogpt/edufineweb_train_000002.npy")
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="has other content"):
        there_and_back("build-nanogpt")


def test_a_folder_with_anything_else_is_never_replaced(folder):
    notes()
    (folder / "mine").mkdir()
    (folder / "mine" / "thesis.txt").write_text("years", encoding="utf-8")
    for flag in ("--overwrite=true", "--overwrite=false"):
        with pytest.raises(UserError, match=r"mine: (is not overwritten.*thesis.txt|exists and has other content)"):
            run("--input=notes", "--to=nanogpt", "--out=mine", flag)
        for out in ("data/notes", ".", "mine/thesis.txt"):
            with pytest.raises(UserError, match="is a file, the folder to be converted or the current folder"):
                run("--input=notes", "--to=nanogpt", f"--out={out}", flag)
    assert files_under("mine") == ["thesis.txt"]
    (folder / "empty").mkdir()
    assert run("--input=notes", "--to=nanogpt", "--out=empty") == 0
    (folder / "empty" / "meta.pkl").write_bytes(b"of the user")
    assert run("--input=notes", "--to=nanogpt", "--out=empty") == 0


# ---- failures


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_no_files(error, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise error

    notes()
    there_and_back("llmc")
    before = files_under(".")
    monkeypatch.setattr(foreign_writer, "write_parts", stop)
    monkeypatch.setattr("prepare_data.shard_writer._write_all", stop)
    outward = ["--input=notes", "--to=llmc", "--out=other programs/x"]
    inward = ["--input=other programs/llmc", "--tokenizer=bytes", "--name=x"]
    replacing = [*outward[:2], "--out=other programs/llmc", "--overwrite=true"]
    for flags in (outward, inward, replacing):
        if error is KeyboardInterrupt:
            assert run(*flags) == 130
            assert "interrupted: nothing was written" in capsys.readouterr().err
        else:
            with pytest.raises(UserError, match=r"No space left on device\); nothing was changed: free disk space"):
                run(*flags)
        assert files_under(".") == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot test whether a process is alive without harming it")
def test_what_a_killed_run_left_is_removed(monkeypatch):
    notes()
    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "getpid", lambda: 2**22 + 1)  # above Linux's largest
        folders.temporary(Path("outs")).joinpath("train.bin").write_bytes(b"half")
    assert run("--input=notes", "--to=nanogpt", "--out=outs/x") == 0
    assert os.listdir("outs") == ["x"]


@pytest.mark.parametrize("size", ["small", "large"])  # a large split is not checked before its first read elsewhere
@pytest.mark.parametrize("direction", ["damaged dataset", "id in the middle", "wrong tokenizer", "truncated"])
def test_damage_is_found_before_anything_is_renamed(direction, size, monkeypatch):
    monkeypatch.setattr("prepare_data.shard_check.MAX_AT_ONCE", 0 if size == "large" else 1 << 27)
    idle = SimpleNamespace(Lock=threading.Lock, Thread=lambda **kwargs: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr("prepare_data.shard_check.threading", idle)  # nothing is checked in the background
    monkeypatch.setattr("prepare_data.foreign.END", 1100)  # bytes that are looked at when a folder is opened
    notes()
    assert run("--input=notes", "--to=llmc", "--out=llmc") == 0
    before = files_under(".")
    is_own = direction == "damaged dataset"
    path = Path("data/notes/train_000000.bin" if is_own else "llmc/fineweb_train_000001.bin")
    data, place = path.read_bytes(), 1030 if direction == "wrong tokenizer" else 2000
    wrong = struct.pack("<H", 77 if is_own else 50_000)
    path.write_bytes(data[:-2] if direction == "truncated" else data[:place] + wrong + data[place + 2 :])
    outward = ["--input=notes", "--to=nanogpt", "--out=x"]
    inward = ["--input=llmc", "--tokenizer=bytes", "--name=x"]
    match = {"damaged dataset": "crc32", "truncated": "the file has .* bytes: truncated"}
    with pytest.raises(UserError, match=match.get(direction, r"contains id 50000, but the vocab.*--tokenizer=")):
        run(*(outward if is_own else inward))
    assert files_under(".") == before


def test_masks_are_refused():
    make("notes", documents("a b c"), documents("d"), masked=True)
    with pytest.raises(UserError, match=r"notes: has loss masks, which nanoGPT's files cannot hold: it would train on"):
        run("--input=notes", "--to=nanogpt", "--out=x")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "convert needs --input=FOLDER"),
        ("--input=nowhere --tokenizer=gpt2", "no such folder, and no dataset of that name in data/"),
        ("--input=text --tokenizer=gpt2", "neither a dataset nor token shards.*prepare_data text --input=text"),
        ("--input=text/a.txt --tokenizer=gpt2", "neither a dataset nor token shards"),
        ("--input=llmc/fineweb_val_000000.bin", "a file of a dataset; give its folder: --input=llmc"),
        ("--input=llmc", "its tokenizer is unknown: pass --tokenizer=gpt2"),
        ("--input=llmc --to=nanogpt --out=x", "its tokenizer is unknown: pass --tokenizer=gpt2"),
        ("--input=llmc --tokenizer=gpt9", "--tokenizer=gpt9: no such tokenizer"),
        ("--input=llmc --tokenizer=bytes --name=a/b", "cannot name a dataset"),
        ("--input=data/llmc2 --tokenizer=bytes", "is the folder to be converted; choose another --name"),
        ("--input=notes", "is a Sprout dataset; to write it for another program: .* --to=nanogpt --out=DIR"),
        ("--input=notes --to=nanogpt", "needs the folder to write: --out=DIR"),
        ("--input=llmc --out=x", "add --to=nanogpt"),
        ("--input=notes --to=nano --out=x", "expected nanogpt, .* or none; did you mean nanogpt"),
        ("--input=notes --to=nanogpt --out=x --tokenizer=gpt2", "--tokenizer=gpt2 has no effect"),
        (
            f"--input=notes --to=nanogpt --out={'x' * 300}",
            "--out=x.*: expected a path, with names of at most 255",
        ),
        ("--input=notes --to=nanogpt --out=text/a.txt/x", "a.txt/x: cannot be written .*choose another --out"),
        ("--input=notes --to=nanogpt --out=x --name=x", "--name: no effect with convert --to=nanogpt; leave it out"),
        ("--input=notes --to=nanogpt --out=x --shard_tokens=100", "--shard_tokens: no effect with convert --to=nan"),
        ("--input=llmc --tokenizer=bytes --dry_run --split=tail", "--dry_run and --split: no effect with convert; le"),
        ("--input=tiny --tokenizer=bytes --to=llmc --out=x", "the val split has no text, which llm.c cannot read"),
    ],
)
def test_what_is_refused(flags, message):
    notes()
    run("--input=notes", "--to=llmc", "--out=llmc")
    run("--input=notes", "--to=llmc", "--out=data/llmc2")
    Path("text").mkdir()
    Path("text/a.txt").write_text("Once", encoding="utf-8")
    Path("tiny").mkdir()
    for name, ids in (("train", [EOS, 1, 2, EOS]), ("val", [EOS, EOS])):
        np.array(ids, "<u2").tofile(f"tiny/{name}.bin")
    before = files_under(".")
    with pytest.raises(UserError, match=message):
        run(*flags.split())
    assert files_under(".") == before


def test_flags_of_convert_have_no_effect_elsewhere():
    with pytest.raises(UserError, match="--to and --out: no effect with text; leave them out"):
        main(["text", "--input=a.txt", "--to=nanogpt", "--out=x"])


def test_what_a_dataset_records_of_its_source():
    notes()
    there_and_back("nanogpt")
    meta = json.loads(Path("data/nanogpt/dataset.json").read_text(encoding="utf-8"))
    assert meta["source"] == {"name": "shards of another program", "folder": "nanogpt"}
    assert convert.find_input("nanogpt", Path("data")) == Path("data/nanogpt")
