"""The index of a train split: the same passages whatever the blocks, their sources; an index that is stale, damaged,
interrupted, or cannot be written."""

import json
import os
import tracemalloc
import zlib

import numpy as np
import pytest

from common.tokenizer import bytes_tokenizer
from files import DamagedFile
from prepare_data import passage_index, passages
from prepare_data.novelty import Novelty
from prepare_data.passage_index import INDEX, TRAILER, open_train_text
from prepare_data.passages import SEPARATOR, Block, Checked, find_passages, suffix_order
from prepare_data.shard_writer import ShardWriter, write_dataset
from prepare_data.shards import open_dataset

TOKENIZER = bytes_tokenizer()
DOCUMENTS = [
    "The cat sat on the mat.\nIt was 世界 the best mat of all,\nsaid the cat.\n",
    "Ein Fluß fließt.\n\nDer Fluß ist naß, sagt die Katze. " * 3,
    "short",
    "The cat sat on the mat.\nIt was not the best mat of all.\n",
]


def make_dataset(folder, documents=DOCUMENTS, val=("held out text the cat sat",), masked=False, shard_tokens=64):
    folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    for split, texts in (("train", documents), ("val", val)):
        writer = ShardWriter(folder, split, TOKENIZER, shard_tokens, masked)
        writer.append(np.array([TOKENIZER.eos_id]))
        for text in texts:
            ids = TOKENIZER.encode(text)
            writer.append(ids, np.zeros(len(ids), bool) if masked else None)
            writer.append(np.array([TOKENIZER.eos_id]))
        shards[split] = writer.close()
    source = {"source": {"name": "text", "origin": "somewhere"}, "documents": len(documents) + len(val)}
    write_dataset(folder, TOKENIZER, shards, source)
    return open_dataset(folder)


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "data" / "ein Text é")


TEXT = "said the cat. It was the best mat of all,\nsaid the cat. Der Fluß ist naß, sagt die Maus. 世界 the best shor"


def found_in(dataset, text=TEXT):
    [found] = open_train_text(dataset).find([Checked(text)])
    return found


@pytest.mark.parametrize("block", [40, 64, 90, 10_000])
def test_passages_and_sources_do_not_depend_on_the_blocks(dataset, monkeypatch, block):
    whole = SEPARATOR + SEPARATOR.join(text.encode() for text in DOCUMENTS) + SEPARATOR
    order = suffix_order(whole, len(whole), False).tobytes()
    [expected] = find_passages([Block(whole, order, 0)], [Checked(TEXT)])
    for module in (passages, passage_index):
        monkeypatch.setattr(module, "MAX_BYTES", 60)
    monkeypatch.setattr(passage_index, "BLOCK", block)
    monkeypatch.setattr(passage_index, "READ", 7)
    text = open_train_text(dataset)
    assert len(text.entries) > 1 or block > 1000
    checked = Checked(TEXT)
    [found] = text.find([checked])
    assert [passage[:3] for passage in found] == [passage[:3] for passage in expected]
    for passage in found:
        size, source = checked.size(passage), text.source(passage, checked.size(passage))
        data = DOCUMENTS[source.document - 1].encode()
        assert whole[passage.at :][:size] == data[source.byte :][:size] == TEXT[passage.start : passage.end].encode()
        assert source.line == data[: source.byte].count(b"\n") + 1
        assert data[: source.byte].endswith(source.before.encode())
        assert data[source.byte + size :].startswith(source.after.encode())


def test_the_index_is_built_once(dataset, capsys):
    before = found_in(dataset)
    assert "indexing the" in capsys.readouterr().err
    written = (dataset.folder / INDEX).read_bytes()
    assert found_in(open_dataset(dataset.folder)) == before
    assert capsys.readouterr().err == ""
    assert (dataset.folder / INDEX).read_bytes() == written
    assert [path.name for path in dataset.folder.iterdir() if path.name.startswith(".")] == []


def crafted(data: bytes, order: bytes = b"", padding: int = 0, **numbers: object) -> bytes:
    """An index with other numbers and places in its first block, and the checksums that belong to them."""
    length, _, magic = TRAILER.unpack(data[-TRAILER.size :])
    blocks, content = data[: -TRAILER.size - length], json.loads(data[-TRAILER.size - length : -TRAILER.size])
    first = content["blocks"][0]
    end = first["position"] + first["text_bytes"]
    blocks = blocks[:end] + order + blocks[end + len(order) :]
    first["crc32"] = zlib.crc32(blocks[first["position"] : end + 4 * first["places"]])
    first |= numbers
    text = json.dumps(content).encode() + b" " * padding
    return blocks + text + TRAILER.pack(len(text), zlib.crc32(text), magic)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "incomplete"),
        (lambda data: b"", "incomplete"),
        (lambda data: data[:200], "incomplete"),
        (lambda data: data[: -TRAILER.size - 5] + b"?" + data[-TRAILER.size - 4 :], "list of blocks is damaged"),
        (lambda data: data[:-1] + b"\x09", "another version"),
        (lambda data: bytes([data[0] ^ 1]) + data[1:], "checksum of its block 0"),
        (lambda data: crafted(data, text_bytes=10**10), "numbers that no index has"),
        (lambda data: crafted(data, text_bytes="1"), "numbers that no index has"),
        (lambda data: crafted(data, padding=10**6), "incomplete, or another kind of file"),
        (lambda data: crafted(data, order=b"\xff" * 4), "block 0 has places beyond its text"),
    ],
    ids=["cut", "empty", "short", "list", "version", "block", "huge", "text", "padded", "places"],
)
def test_a_damaged_index_is_built_again(dataset, capsys, damage, reason):
    expected = [copied.passages for copied in Novelty(dataset, 2).check([("", TEXT)])]
    data = (dataset.folder / INDEX).read_bytes()
    (dataset.folder / INDEX).write_bytes(damage(data))
    capsys.readouterr()
    assert [copied.passages for copied in Novelty(dataset, 2).check([("", TEXT)])] == expected
    assert reason in capsys.readouterr().err
    assert (dataset.folder / INDEX).read_bytes() == data


def test_an_index_that_is_a_folder_or_a_link_is_not_followed(dataset, tmp_path, capsys):
    (tmp_path / "elsewhere").write_bytes(b"precious")
    (dataset.folder / INDEX).symlink_to(tmp_path / "elsewhere")
    assert found_in(dataset)
    assert "a regular file" in capsys.readouterr().err
    assert (tmp_path / "elsewhere").read_bytes() == b"precious"


def test_the_index_of_other_text_is_built_again(dataset, capsys):
    found_in(dataset)
    for file in dataset.folder.glob("*.bin"):
        file.unlink()
    changed = make_dataset(dataset.folder, ["Another text, the mat of Maus."])
    capsys.readouterr()
    assert "mat of" in [TEXT[passage.start : passage.end] for passage in found_in(changed)]
    assert "the dataset has changed since" in capsys.readouterr().err


def test_damage_that_comes_later_is_mended(dataset):
    novelty = Novelty(dataset, 2)
    novelty.text._last = None
    (dataset.folder / INDEX).write_bytes(b"something else")
    assert novelty.check([("", TEXT)])[0].copied > 0
    assert TRAILER.unpack((dataset.folder / INDEX).read_bytes()[-TRAILER.size :])[2] == passage_index.MAGIC


def test_interrupted_it_leaves_nothing(dataset, monkeypatch):
    monkeypatch.setattr(passage_index, "BLOCK", 64)
    monkeypatch.setattr(passage_index, "MAX_BYTES", 16)
    calls = []

    def interrupted(text, own, after_word):
        calls.append(text)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return suffix_order(text, own, after_word)

    names = sorted(path.name for path in dataset.folder.iterdir())
    monkeypatch.setattr(passage_index, "suffix_order", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_train_text(dataset)
    assert sorted(path.name for path in dataset.folder.iterdir()) == names


@pytest.mark.parametrize("problem", ["read-only", "full", "full later"])
def test_where_it_cannot_be_written_it_stays_in_memory(dataset, monkeypatch, capsys, problem):
    expected = found_in(make_dataset(dataset.folder.with_name("other")))
    capsys.readouterr()

    def fail(*_):
        raise PermissionError(13, "Permission denied") if problem == "read-only" else OSError(28, "No space left")

    if problem == "read-only":
        monkeypatch.setattr(passage_index.folders, "temporary", fail)
    elif problem == "full":
        usage = passage_index.shutil.disk_usage(dataset.folder)
        monkeypatch.setattr(passage_index.shutil, "disk_usage", lambda _: usage._replace(free=10))
    else:
        monkeypatch.setattr(os, "fsync", fail)
    assert found_in(dataset) == expected
    err = capsys.readouterr().err
    assert f"cannot be kept in {dataset.folder}" in err
    assert {"read-only": "Permission denied", "full": "MB are free", "full later": "No space left"}[problem] in err
    assert not (dataset.folder / INDEX).exists()
    assert [path.name for path in dataset.folder.iterdir() if path.name.startswith(".")] == []


def test_masked_tokens_are_part_of_the_text(tmp_path, dataset):
    assert found_in(make_dataset(tmp_path / "masked", masked=True)) == found_in(dataset)


def test_a_damaged_dataset_is_an_error(dataset):
    shard = dataset.folder / "train_000000.bin"
    data = bytearray(shard.read_bytes())
    data[1030] ^= 1
    shard.write_bytes(data)
    with pytest.raises(Exception, match="damaged: its crc32"):
        open_train_text(dataset)
    assert not (dataset.folder / INDEX).exists()


def test_memory_does_not_depend_on_the_size_of_the_text(tmp_path, monkeypatch):
    monkeypatch.setattr(passage_index, "BLOCK", 1 << 16)
    monkeypatch.setattr(passage_index, "MAX_BYTES", 1 << 12)
    monkeypatch.setattr(passage_index, "READ", 1 << 12)
    monkeypatch.setattr(passages, "CHUNK", 1 << 12)
    words = np.random.default_rng(0).integers(0, 5000, 200_000)
    passages.find_passages([], [Checked("a word")])  # makes the table of characters
    peaks = []
    for size in (40_000, 200_000):
        text = " ".join(f"w{word}" for word in words[:size])
        dataset = make_dataset(tmp_path / str(size), [text], shard_tokens=100_000)
        checked = Checked(text[:2000])
        tracemalloc.start()
        [found] = open_train_text(dataset).find([checked])
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert found[0].end >= 1990
    assert peaks[1] < 1.2 * peaks[0], peaks
    assert peaks[1] < 20 * (1 << 16), peaks


def test_a_block_that_cannot_be_read_names_the_file(dataset):
    text = open_train_text(dataset)
    (dataset.folder / INDEX).unlink()
    with pytest.raises(DamagedFile, match=INDEX):
        text.find([Checked(TEXT)])
