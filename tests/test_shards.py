"""Shards: their bytes, masks, reads across shards, files of other programs, and an error for each kind of damage."""

import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.tokenizer import Tokenizer, bytes_tokenizer
from errors import UserError
from prepare_data.shard_writer import ShardWriter, write_dataset
from prepare_data.shards import Split, open_dataset

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
    monkeypatch.setattr("prepare_data.shards.MAX_OPEN_FILES", 3)
    ids = random_ids(80)
    split = open_dataset(make(tmp_path, ids, shard_tokens=8)).train
    assert np.array_equal(split.read(0, 80), ids)
    assert np.array_equal(split.read(0, 80), ids)
    assert len(split._files) == 3


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
    data[-1] ^= 1
    path.write_bytes(data)
    changed = open_dataset(tmp_path, "bytes")
    assert changed.fingerprint != dataset.fingerprint


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
