"""Shards: their bytes, masks, reads across shards, files of other programs, and an error for each kind of damage."""

import gzip
import io
import json
import shlex
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tokenizer import Tokenizer, bytes_tokenizer, char_tokenizer
from errors import UserError
from prepare_data.__main__ import main as prepare
from prepare_data.shard_check import ContentCheck
from prepare_data.shard_writer import ShardWriter, write_dataset
from prepare_data.shards import Split, is_dataset, open_dataset
from tests.conftest import ROOT

EOS = 256


def make(folder, train, val=None, tokenizer=None, shard_tokens=1000, mask=None):
    """Writes a dataset of the given ids, 13 per append, so that appends do not align with shards or mask bytes."""
    tokenizer = tokenizer or bytes_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for split, ids in (("train", train), ("val", train if val is None else val)):
        writer = ShardWriter(folder, split, tokenizer, shard_tokens, masked=mask is not None)
        ids = np.asarray(ids, dtype=np.int64)
        for start in range(0, len(ids), 13):
            writer.append(ids[start : start + 13], None if mask is None else mask[start : start + 13])
        shards[split] = writer.close()
    write_dataset(folder, tokenizer, shards, {"source": {"name": "test"}})
    return folder


def random_ids(n, vocab=257, seed=0):
    return np.random.default_rng(seed).integers(0, vocab, n)


def npy(ids):
    file = io.BytesIO()
    np.save(file, ids)
    return file.getvalue()


def test_bytes_of_a_shard(tmp_path):
    make(tmp_path, [EOS, 104, 105, EOS], [EOS, 1, EOS, 2, EOS])
    data = (tmp_path / "train_000000.bin").read_bytes()
    assert struct.unpack("<256i", data[:1024]) == (20240520, 1, 4, *[0] * 253)
    assert data[1024:] == struct.pack("<4H", EOS, 104, 105, EOS)
    meta = json.loads((tmp_path / "dataset.json").read_text(encoding="utf-8"))
    assert meta["shards"]["train"] == [
        {"file": "train_000000.bin", "tokens": 4, "documents": 1, "bytes": 2, "crc32": zlib.crc32(data[1024:])}
    ]
    assert meta["shards"]["val"][0]["documents"] == 2
    assert (meta["dtype"], meta["eos_id"], meta["vocab_size"]) == ("uint16", EOS, 257)
    assert meta["tokenizer"] == bytes_tokenizer().to_dict()


def test_a_large_vocabulary_is_written_as_uint32(tmp_path):
    tokens = [bytes([i]) for i in range(256)] + [bytes([i, j, 0]) for i in range(256) for j in range(256)] + [None]
    large = Tokenizer("bpe", "gpt2", tokens, len(tokens) - 1)
    make(tmp_path, [large.eos_id, 70_000 - 4464, 65_700, large.eos_id], tokenizer=large)
    data = (tmp_path / "train_000000.bin").read_bytes()
    assert struct.unpack("<3i", data[:12]) == (20240801, 7, 4)
    assert struct.unpack("<4I", data[1024:]) == (large.eos_id, 65_536, 65_700, large.eos_id)
    assert open_dataset(tmp_path).train.read(1, 2).tolist() == [65_536, 65_700]


@pytest.mark.parametrize("invalid", [257, 70_000, -1])
def test_an_id_outside_the_vocabulary_is_not_written(invalid, tmp_path):
    with pytest.raises(UserError, match=f"{invalid} is outside the vocabulary of 257"):
        make(tmp_path, [1, 2, invalid])


@given(data=st.data(), n=st.integers(1, 300), shard_tokens=st.integers(8, 100))
@settings(max_examples=20, deadline=None)
def test_any_read_across_shards(tmp_path_factory, data, n, shard_tokens):
    ids = random_ids(n)
    mask = random_ids(n, 2, seed=1).astype(bool)
    dataset = open_dataset(make(tmp_path_factory.mktemp("d"), ids, shard_tokens=shard_tokens, mask=mask))
    assert len(dataset.train) == n
    assert len(dataset.train.shards) == -(-n // shard_tokens)
    start = data.draw(st.integers(0, n - 1))
    count = data.draw(st.integers(1, n - start))
    assert np.array_equal(dataset.train.read(start, count), ids[start : start + count])
    assert np.array_equal(dataset.train.mask(start, count), mask[start : start + count])
    with pytest.raises(IndexError):
        dataset.train.read(start, n - start + 1)
    entries = dataset.meta["shards"]["train"]
    assert sum(entry["bytes"] for entry in entries) == np.count_nonzero(ids != EOS)
    assert sum(entry["documents"] for entry in entries) == np.count_nonzero(ids[1:] == EOS)


def test_without_masks_mask_is_none(tmp_path):
    assert open_dataset(make(tmp_path, [1, 2, 3])).train.mask(0, 2) is None


def test_the_number_of_open_files_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr("prepare_data.shards.max_open_files", lambda wanted: 3)
    ids = random_ids(80)
    split = open_dataset(make(tmp_path, ids, shard_tokens=8)).train
    assert np.array_equal(split.read(0, 80), ids)
    assert np.array_equal(split.read(0, 80), ids)
    assert len(split._files) == 3
    split.read(8 * 7, 1)
    split.read(8 * 2, 1)
    assert [path.name for path in split._files][-2:] == ["train_000007.bin", "train_000002.bin"]


@pytest.mark.skipif(sys.platform == "win32", reason="no limits to set")
def test_three_hundred_shards_stay_open_and_too_few_files_are_no_error(tmp_path):
    """In a process that may open 256 files, as on macOS, and then in one whose other files leave it next to none."""
    make(tmp_path, random_ids(2400), shard_tokens=8)
    script = """if True:
        import errno, os, resource, sys
        import numpy as np
        from pathlib import Path
        from prepare_data.shards import open_dataset
        opened, path_open = 0, Path.open
        def count(self, *args, **kwargs):
            global opened
            opened += self.suffix == ".bin"
            return path_open(self, *args, **kwargs)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
        split = open_dataset(sys.argv[1]).train
        ids = split.read(0, 2400)
        Path.open = count
        for start in np.random.default_rng(0).integers(0, 2400, 3000).tolist():
            assert split.read(start, 1) == ids[start]
        assert opened == 0, opened
        split = open_dataset(sys.argv[1]).train
        split.read(0, 2000)
        others = []
        try:
            while True:
                others.append(os.open(os.devnull, os.O_RDONLY))
        except OSError as error:
            assert error.errno == errno.EMFILE
        assert np.array_equal(split.read(0, 2400), ids)
        assert len(split._files) < 250
    """
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, cwd=ROOT)


def test_reads_from_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("prepare_data.shards.max_open_files", lambda wanted: 2)
    ids = random_ids(400)
    split = open_dataset(make(tmp_path, ids, shard_tokens=8)).train
    with ThreadPoolExecutor(4) as threads:
        starts = np.random.default_rng(0).integers(0, 390, 400).tolist()
        for start, read in zip(starts, threads.map(partial(split.read, count=10), starts), strict=True):
            assert np.array_equal(read, ids[start : start + 10])


def test_fingerprint_depends_on_the_data_not_the_name(tmp_path):
    ids = random_ids(100)
    first = open_dataset(make(tmp_path / "a", ids)).fingerprint
    assert open_dataset(make(tmp_path / "ü b", ids)).fingerprint == first
    assert open_dataset(make(tmp_path / "c", ids, ids[:99])).fingerprint != first
    assert open_dataset(make(tmp_path / "d", ids, mask=ids > 5)).fingerprint != first


def patch(name, offset, data):
    def damage(folder):
        with (folder / name).open("r+b") as file:
            file.seek(offset)
            file.write(data)

    return damage


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def edit(change):
    def damage(folder):
        meta = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        change(meta)
        (folder / "dataset.json").write_text(json.dumps(meta), encoding="utf-8")

    return damage


TRAIN = "train_000000.bin"
DAMAGES = {
    "magic": (patch(TRAIN, 0, b"\x01"), "not a token shard"),
    "version": (patch(TRAIN, 4, b"\x02"), "version 2, expected 1"),
    "count": (patch(TRAIN, 8, b"\x07"), "header says 7 ids"),
    "negative count": (patch(TRAIN, 8, b"\xff\xff\xff\xff"), "header says -1 ids"),
    "dtype": (patch(TRAIN, 0, struct.pack("<2i", 20240801, 7)), "header says 200 ids of uint32"),
    "cut": (cut(TRAIN, 1024 + 100), "has 1124 bytes, expected 1424"),
    "cut in the header": (cut(TRAIN, 100), "has 100 bytes"),
    "empty": (cut(TRAIN, 0), "has 0 bytes"),
    "missing": (lambda folder: (folder / TRAIN).unlink(), "missing"),
    "flipped bit": (patch(TRAIN, 1100, b"\x05\x00"), "crc32"),
    "flipped mask bit": (patch("train_000000.mask", 3, b"\x05"), r"mask: damaged.*crc32"),
    "cut mask": (cut("train_000000.mask", 24), r"mask: has 24 bytes, expected 25"),
    "json cut": (cut("dataset.json", 500), "cannot be read as JSON"),
    "json format": (edit(lambda meta: meta.update(format="x")), "sprout-dataset"),
    "json version": (edit(lambda meta: meta.update(version=9)), "version is 9"),
    "json path": (edit(lambda meta: meta["shards"]["train"][0].update(file="../../etc/passwd")), "must be train_000"),
    "json offset": (edit(lambda meta: meta["shards"]["train"][0].update(offset=0)), "keys of"),
    "json number": (edit(lambda meta: meta["shards"]["train"][0].update(tokens="200")), "numbers of"),
    "json count": (edit(lambda meta: meta["shards"]["train"][0].update(tokens=199)), "fingerprint"),
    "json no val": (edit(lambda meta: meta["shards"].update(val=[])), "val split has no shards"),
    "json vocabulary": (edit(lambda meta: meta.update(vocab_size=300)), "vocab_size"),
    "json tokenizer": (edit(lambda meta: meta.update(tokenizer=None)), "not a valid tokenizer"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_raises(kind, tmp_path):
    damage, message = DAMAGES[kind]
    ids = random_ids(200)
    make(tmp_path, ids, mask=ids > 100)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(tmp_path).train.read(150, 10)
    assert str(tmp_path) in str(caught.value)
    assert "again" in str(caught.value)


@pytest.fixture
def in_background(monkeypatch):
    monkeypatch.setattr("prepare_data.shard_check.MAX_AT_ONCE", 0)


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("in_background")
@pytest.mark.parametrize("damaged", ["flipped bit", "flipped mask bit"])
def test_a_large_split_is_checked_in_the_background(damaged, tmp_path, monkeypatch):
    """The first read does not wait; damage anywhere in the split ends a later read."""
    may_check = threading.Event()
    check = ContentCheck._check
    monkeypatch.setattr(ContentCheck, "_check", lambda self, shard: may_check.wait(20) and check(self, shard))
    ids = random_ids(600)
    make(tmp_path, ids, shard_tokens=200, mask=ids > 100)
    damage, message = DAMAGES[damaged]
    damage(tmp_path)
    split = open_dataset(tmp_path).train
    assert np.array_equal(split.read(450, 100), ids[450:550])
    may_check.set()
    wait_for(lambda: split.check._found is not None)
    for read in (split.read, split.mask):
        with pytest.raises(UserError, match=message):
            read(450, 100)


@pytest.mark.usefixtures("in_background")
def test_an_intact_large_split(tmp_path):
    ids = random_ids(600)
    split = open_dataset(make(tmp_path, ids, shard_tokens=200, mask=ids > 100)).train
    split.read(0, 1)
    wait_for(lambda: split.check.is_complete)
    assert np.array_equal(split.read(0, 600), ids)


def test_a_small_split_is_checked_before_its_first_read(tmp_path):
    make(tmp_path, random_ids(600), shard_tokens=200)
    DAMAGES["flipped bit"][0](tmp_path)
    with pytest.raises(UserError, match=r"train_000000.bin: damaged"):
        open_dataset(tmp_path).train.read(500, 10)


@pytest.mark.usefixtures("in_background")
def test_an_id_outside_the_vocabulary_is_never_returned(tmp_path, monkeypatch):
    monkeypatch.setattr(ContentCheck, "_check", lambda self, shard: None)
    make(tmp_path, random_ids(600))
    patch(TRAIN, 1024 + 2 * 300, struct.pack("<H", 257))(tmp_path)
    split = open_dataset(tmp_path).train
    split.read(0, 300)
    with pytest.raises(UserError, match="contains id 257, but the vocabulary has 257 ids"):
        split.read(290, 20)


def test_a_shard_truncated_while_in_use(tmp_path):
    split: Split = open_dataset(make(tmp_path, random_ids(5000), shard_tokens=10_000)).train
    split.read(0, 10)
    cut(TRAIN, 2000)(tmp_path)
    with pytest.raises(UserError, match="truncated while in use"):
        split.read(4000, 100)


def write_shard(path, ids, dtype="uint16"):
    header = struct.pack("<3i", *{"uint16": (20240520, 1), "uint32": (20240801, 7)}[dtype], len(ids))
    path.write_bytes(header.ljust(1024, b"\0") + np.asarray(ids, dtype=dtype).tobytes())


@pytest.mark.parametrize("kind", ["headerless", "uint16", "uint32"])
def test_shards_of_other_programs(kind, tmp_path):
    train, val = random_ids(300), random_ids(50, seed=1)
    if kind == "headerless":
        for name, ids in (("train.bin", train), ("val.bin", val)):
            (tmp_path / name).write_bytes(ids.astype("<u2").tobytes())
    else:
        write_shard(tmp_path / "fineweb_train_000001.bin", train[:100], kind)
        write_shard(tmp_path / "fineweb_train_000002.bin", train[100:], kind)
        write_shard(tmp_path / "fineweb_val_000000.bin", val, kind)
    with pytest.raises(UserError, match="--tokenizer=gpt2"):
        open_dataset(tmp_path, "bpe")
    dataset = open_dataset(tmp_path, "bytes")
    assert np.array_equal(dataset.train.read(0, 300), train)
    assert np.array_equal(dataset.val.read(10, 40), val[10:])
    assert (dataset.name, dataset.meta["eos_id"]) == (tmp_path.name, EOS)
    assert dataset.fingerprint == open_dataset(tmp_path, "bytes").fingerprint
    path = sorted(tmp_path.glob("*train*"))[-1]
    data = bytearray(path.read_bytes())
    data[-4 if kind == "uint32" else -2] ^= 1
    path.write_bytes(data)
    changed = open_dataset(tmp_path, "bytes")
    assert changed.fingerprint != dataset.fingerprint


NAMES = {
    "train": "medieval_train_000001 train Train-1 retrieval_train interval-train training.0001 train/0001",
    "val": "retrieval_val constrained_val_000001 trained_valid validation-01 VAL val/1 val/val_1",
    None: "train_val val_train_000001 trainval_000001 medieval_000001 train2val retrained_1 000001 val/train_1",
}


@pytest.mark.parametrize(("name", "split"), [(name, split) for split, names in NAMES.items() for name in names.split()])
def test_the_split_of_a_foreign_shard_is_a_whole_word_of_its_name(name, split, tmp_path):
    own = np.full(20, 77)
    others = {"train": random_ids(60, 70), "val": random_ids(50, 70)}
    for path, ids in (("text_train_9", others["train"]), ("text_val_9", others["val"]), (name, own)):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        write_shard(tmp_path / f"{path}.bin", ids)
    assert is_dataset(tmp_path)
    if split is None:
        message = rf"not clearly train or val: {name}.bin \((neither|train and val)\).*Rename them, .* to train_\d+.bin"
        with pytest.raises(UserError, match=message):
            open_dataset(tmp_path, "bytes")
        return
    dataset = open_dataset(tmp_path, "bytes")
    assert (len(dataset.train), len(dataset.val)) == ((80, 50) if split == "train" else (60, 70))
    read = {"train": dataset.train, "val": dataset.val}[split]
    assert (read.read(0, len(read)) == 77).sum() == 20


def test_unclear_names_are_counted_and_test_files_left_out(tmp_path):
    for name in ("train", "dev_1", "test", "test_2"):
        write_shard(tmp_path / f"{name}.bin", random_ids(50))
    dataset = open_dataset(tmp_path, "bytes")
    assert dataset.meta["notes"] == ["left out, neither train nor val: test.bin, test_2.bin"]
    assert len(dataset.val) == 50
    write_shard(tmp_path / "val.bin", random_ids(60))
    dataset = open_dataset(tmp_path, "bytes")
    assert dataset.meta["notes"] == ["left out, neither train nor val: dev_1.bin, test.bin, test_2.bin"]
    assert len(dataset.val) == 60
    for i in range(5):
        write_shard(tmp_path / f"part_{i}.bin", random_ids(50))
    message = r"part_0.bin \(neither\), part_1.bin \(neither\), part_2.bin \(neither\) and 2 more"
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path, "bytes")


def test_a_folder_of_unclear_shards_is_a_dataset_and_other_binary_files_are_not(tmp_path):
    write_shard(tmp_path / "trainval_000001.bin", random_ids(50))
    assert is_dataset(tmp_path)
    (tmp_path / "trainval_000001.bin").write_bytes(b"firmware")
    (tmp_path / "training_args.bin").write_bytes(b"PK")
    assert not is_dataset(tmp_path)
    (tmp_path / "train.bin").write_bytes(b"abcd")
    assert is_dataset(tmp_path)


@pytest.mark.parametrize("vocab_size", [65, 257, 60_000, 200_000])
@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32"])
def test_the_width_of_headerless_ids(dtype, vocab_size, tmp_path, monkeypatch):
    if dtype == "uint16" and vocab_size > 65_536:
        return
    tokenizer = (
        bytes_tokenizer() if vocab_size == 257 else char_tokenizer(map(chr, range(0x10000, 0x10000 + vocab_size - 1)))
    )
    monkeypatch.setattr("prepare_data.foreign.named_tokenizer", lambda name: tokenizer)
    ids = {"train": random_ids(5000, vocab_size), "val": random_ids(600, vocab_size)}
    for split in ids:
        (tmp_path / f"{split}.bin").write_bytes(ids[split].astype(dtype).tobytes())
    dataset = open_dataset(tmp_path, "x")
    assert np.array_equal(dataset.train.read(0, 5000), ids["train"])
    assert np.array_equal(dataset.val.read(0, 600), ids["val"])
    assert ("read as uint32" in "".join(dataset.meta["notes"])) == (dtype != "uint16")


@pytest.mark.parametrize(
    ("ids", "tokenizer", "note"),
    [
        (random_ids(5000, 65), "bytes", "of the first ids are control characters as bytes"),
        (random_ids(5000, 65), "large", "the largest of the first ids is 64 of 5,000"),
        (np.array([*b"To be, or not to be.\n"] * 100), "bytes", None),
        (random_ids(5000, 5000), "large", None),
    ],
)
def test_ids_that_do_not_look_like_the_tokenizers(ids, tokenizer, note, tmp_path, monkeypatch):
    known = {"bytes": bytes_tokenizer(), "large": char_tokenizer(map(chr, range(0x10000, 0x10000 + 4999)))}
    monkeypatch.setattr("prepare_data.foreign.named_tokenizer", known.__getitem__)
    for name in ("text_train.bin", "text_val.bin"):
        (tmp_path / name).write_bytes(ids.astype("<u2").tobytes())
    notes = open_dataset(tmp_path, tokenizer).meta["notes"]
    assert [note] == [part for part in [note] if part in notes[0]] if note else notes == []


def test_headerless_bytes_with_eos_are_uint16(tmp_path):
    """ASCII as ids, and 256 after each line: low bytes are below 128 as those of 8-bit ids are."""
    ids = np.array([*b"a line of text", 256] * 50)
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(ids.astype("<u2").tobytes())
    assert np.array_equal(open_dataset(tmp_path, "bytes").train.read(0, 750), ids)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (random_ids(500, 250).astype("<i8").tobytes(), "ids of 64 bits"),
        (random_ids(500, 65).astype("u1").tobytes(), "holds text, or ids of 8 bits"),
        (b"To be, or not to be, that is the question.\n" * 20, "holds text, or ids of 8 bits"),
        (random_ids(500, 50_000).astype("<u2").tobytes(), r"contains id 4\d{4}, but the vocabulary has 257 ids"),
        (random_ids(500, 250).astype("<f4").tobytes(), r"contains id \d+, but the vocabulary has 257 ids"),
        (random_ids(500, 250).astype("<u4").tobytes()[:-1], "1999 bytes cannot be uint16 ids"),
        (random_ids(500, 250).astype(">u2").tobytes(), "holds big-endian ids"),
        (random_ids(500, 250).astype(">u4").tobytes(), "holds big-endian ids"),
        (gzip.compress(random_ids(500, 250).astype("<u2").tobytes()), "is a gzip file .* unpack it first"),
        (npy(random_ids(500, 250).astype("<i8")), r"an array of <i8 with shape \(500,\)"),
        (npy(random_ids(500, 250).astype(">u2")), "an array of >u2"),
        (npy(random_ids(500, 250).astype("<u2"))[:-2], "the header says 500 ids of uint16"),
        (npy(random_ids(500, 250).astype("<u2"))[:9], "not an array that np.save wrote"),
    ],
)
def test_headerless_files_that_are_not_16_or_32_bits(data, message, tmp_path):
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        open_dataset(tmp_path, "bytes")
    assert "delete" not in str(caught.value)  # Sprout did not write it


@pytest.mark.parametrize("dtype", ["<u2", "<i2", "<u4", "<i4"])
@pytest.mark.parametrize("names", ["edufineweb_{}_000001.npy", "{}.npy", "{}.bin", "{}/000001.npy"])
def test_shards_that_numpy_saved(names, dtype, tmp_path):
    ids = random_ids(700)
    for split in ("train", "val"):
        path = tmp_path / names.format(split)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(npy(ids.astype(dtype)))
    dataset = open_dataset(tmp_path, "bytes")
    assert np.array_equal(dataset.train.read(0, 700), ids)
    assert np.array_equal(dataset.val.read(0, 700), ids)


def test_foreign_files_of_two_widths(tmp_path):
    (tmp_path / "train.bin").write_bytes(random_ids(700).astype("<u2").tobytes())
    (tmp_path / "val.bin").write_bytes(random_ids(700).astype("<u4").tobytes())
    with pytest.raises(UserError, match="some of the files hold uint16 ids, others uint32"):
        open_dataset(tmp_path, "bytes")


def test_character_ids_of_nanogpt_need_their_tokenizer(tmp_path, monkeypatch):
    """The command of the message gives the same ids."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "shakespeare_char"
    folder.mkdir()
    content = "To be, or not to be, that is the question.\n" * 20
    (folder / "input.txt").write_text(content, encoding="utf-8")
    alphabet = sorted(set(content))
    ids = np.array([alphabet.index(character) for character in content])
    for split, part in (("train", ids[:774]), ("val", ids[774:])):
        (folder / f"{split}.bin").write_bytes(part.astype("<u2").tobytes())
    (folder / "meta.pkl").write_bytes(b"cos\nsystem\n(S'touch unpickled'\ntR.")
    for tokenizer in ("bytes", "bpe", "char", "gpt2", None):
        with pytest.raises(UserError, match=r"meta.pkl says .* reads no pickle files") as caught:
            open_dataset(folder, tokenizer)
    assert not Path("unpickled").exists()
    command = str(caught.value).partition("python -m prepare_data ")[2].partition(" (or")[0]
    assert prepare(shlex.split(command)) == 0
    prepared = open_dataset("data/shakespeare_char_again")
    assert prepared.train.read(1, len(prepared.train) - 1).tolist() == ids[:774].tolist()
    assert prepared.val.read(0, 86).tolist() == ids[774:].tolist()
    dataset = open_dataset(folder, "data/shakespeare_char_again/dataset.json")
    assert dataset.train.read(0, 774).tolist() == ids[:774].tolist()


def test_foreign_ids_outside_the_vocabulary(tmp_path):
    for name in ("train.bin", "val.bin"):
        (tmp_path / name).write_bytes(np.array([5, 60_000], dtype="<u2").tobytes())
    message = r"train.bin: contains id 60000, but the vocabulary has 257 ids; pass the tokenizer"
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path, "bytes").train.read(0, 1)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("train.bin", b"", "0 bytes"),
        ("train.bin", b"abc", "3 bytes"),
        ("train_000000.bin", b"abcd" * 500, "not a token shard"),
    ],
)
def test_foreign_files_that_are_not_shards(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=r"neither a dataset.json nor a file like val.bin"):
        open_dataset(tmp_path, "bytes")
    (tmp_path / "val.bin").write_bytes(b"abcd")
    with pytest.raises(UserError, match=message):
        open_dataset(tmp_path, "bytes")
