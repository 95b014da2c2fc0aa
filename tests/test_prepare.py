"""Preparation end to end: EOS placement, splits, what sources accept and refuse, and atomic publication of datasets."""

import dataclasses
import gzip
import hashlib
import http.server
import io
import itertools
import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.option import unescape
from common.tokenizer import bytes_tokenizer, char_tokenizer
from errors import UserError
from prepare_data import PrepareOptions, folders, pipeline, sources
from prepare_data.__main__ import main
from prepare_data.pipeline import make_corpus
from prepare_data.resolve import resolve_data
from prepare_data.shards import open_dataset
from prepare_data.sources import documents, encodings, python_stdlib, shakespeare, text
from prepare_data.split import SAMPLE_CHARACTERS, SLICE, Sample, choose_rule, count
from tests.conftest import ROOT

SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test runs in a folder with a space and non-ASCII letters in its name."""
    folder = tmp_path / "my wörk 文"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def ids_of(split):
    return split.read(0, len(split)).tolist()


def prepared(text, *flags, name="d"):
    """The dataset of one file with this text, tokenized as bytes unless the flags name another tokenizer."""
    with open("in.txt", "w", encoding="utf-8", newline="") as file:
        file.write(text)
    assert main(["text", "--input=in.txt", f"--name={name}", "--tokenizer=bytes", *flags]) == 0
    return open_dataset(f"data/{name}")


def files_under(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*"))


def documents_of(split):
    ids = ids_of(split)
    assert ids[0] == ids[-1] == 256
    return [text.decode() for text in bytes(255 if i == 256 else i for i in ids).split(b"\xff")[1:-1]]


# Splits


def test_tail_is_cut_at_a_character_and_the_cut_does_not_end_a_document():
    dataset = prepared("x" * 899 + "y" * 101, "--tokenizer=char")
    x, y, eos = 0, 1, 2
    assert ids_of(dataset.train) == [eos] + [x] * 899 + [y]
    assert ids_of(dataset.val) == [y] * 100 + [eos]
    assert [dataset.meta["shards"][split][0]["documents"] for split in ("train", "val")] == [0, 1]


def test_tail_cut_between_documents():
    dataset = prepared("abc|de|f", "--separator=|", "--val_fraction=0.5")
    assert ids_of(dataset.train) == [256, *b"abc", 256]
    assert ids_of(dataset.val) == [256, *b"de", 256, *b"f", 256]


def test_split_by_documents_keeps_documents_whole_between_eos():
    lines = [f"document number {i}, {'word ' * (i % 7)}" for i in range(300)]
    dataset = prepared("\n".join(lines), "--separator=\\n")
    train, val = documents_of(dataset.train), documents_of(dataset.val)
    assert sorted(train + val) == sorted(lines)
    assert [line for line in lines if line in set(train)] == train, "documents keep their order"
    assert 15 <= len(val) <= 50
    assert dataset.meta["shards"]["val"][0]["documents"] == len(val)
    assert dataset.meta["split"]["rule"] == "documents"
    more = prepared("\n".join(["one more", *lines]), "--separator=\\n", name="more")
    assert set(val) <= set(documents_of(more.val)), "a document's split must not depend on other documents"


def corpus_of(texts):
    return sources.Corpus("c", "c", lambda: iter([(text, True) for text in texts]))


def distinct(sizes):
    """ASCII documents of these sizes, all different where they are long enough."""
    return [(f"{i:03d} " * size)[:size] for i, size in enumerate(sizes)]


def split_of(texts, **options):
    """The rule for these documents, and the documents (or their parts) of train and of val."""
    corpus = corpus_of(texts)
    rule = choose_rule(count(corpus, False), PrepareOptions(**options))
    parts = {"train": [], "val": []}
    for piece in rule.pieces(corpus):
        parts[piece.split].append(piece.text)
    assert len("".join(parts["train"] + parts["val"])) == len("".join(texts))
    return rule, parts["train"], parts["val"]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (distinct([180_000] + [100] * 25), "one document is 98.6% of the text"),
        (distinct([100] * 25 + [180_000]), "one document is 98.6% of the text"),
        (distinct([200] * 19 + [34_200]), "one document is 90% of the text"),
        (distinct([100] * 19), "fewer than 20 documents"),
        (distinct([10] * 20 + [9_000, 9_000]), "whole documents would make val 1.1% of the text"),
        (["the same text"] * 25, "all 25 documents are the same"),
        (["one text"] * 15 + ["two texts"] * 15, "whole documents would make val"),
    ],
)
def test_auto_is_by_tail_where_documents_are_too_uneven(texts, reason):
    rule, _, val = split_of(texts)
    assert rule.name == "tail"
    assert reason in rule.reason
    assert len("".join(val)) == pytest.approx(0.1 * len("".join(texts)), abs=1)
    assert ("copies of another one" in " ".join(rule.notes)) == (len(set(texts)) < len(texts))


def is_near(share, fraction):
    """Within a factor of 1.5, for the smaller of the two splits."""
    wanted, found = (fraction, share) if fraction <= 0.5 else (1 - fraction, 1 - share)
    return 2 / 3 - 1e-9 <= found / wanted <= 3 / 2 + 1e-9


UNEVEN = [100 + 40 * i for i in range(24)]


@pytest.mark.parametrize(
    ("sizes", "val_fraction"),
    [
        *itertools.product([[1000] * 20, [1000] * 30, UNEVEN], [0.05, 0.1, 0.5, 0.9]),
        *itertools.product([[4000] + [500] * 40, [30_000] + [1000] * 40], [0.05, 0.1, 0.5]),
    ],
)
def test_documents_come_near_val_fraction_in_bytes(sizes, val_fraction):
    for salt in range(10):  # other hashes
        texts = [f"{salt}{text[1:]}" for text in distinct(sizes)]
        rule, train, val = split_of(texts, val_fraction=val_fraction)
        share = len("".join(val)) / sum(sizes)
        assert rule.name == "documents"
        assert sorted(train + val) == sorted(texts)
        assert is_near(share, val_fraction)


@given(
    st.lists(st.integers(1, 2000), min_size=2, max_size=60),
    st.sampled_from([1e-9, 0.001, 0.1, 0.5, 0.9, 1 - 1e-9]),
    st.sampled_from(["auto", "documents", "tail"]),
    st.integers(1, 60),
)
@settings(max_examples=200, deadline=None)
def test_neither_split_is_empty_and_copies_stay_together(sizes, val_fraction, split, period):
    texts = [(f"{i % period:03d} " * size)[:size] for i, size in enumerate(sizes)]
    assume(len("".join(texts)) > 1)
    assume(split != "documents" or len(set(texts)) > 1)
    rule, train, val = split_of(texts, split=split, val_fraction=val_fraction)
    assert train
    assert val
    if rule.name == "documents":
        assert not set(train) & set(val)
        near = is_near(len("".join(val)) / sum(sizes), val_fraction)
        assert near != bool(rule.notes)
        assert near or split == "documents"


def test_the_largest_document_stays_in_train_with_documents_too(capsys):
    with open("in.txt", "w", encoding="utf-8") as file:
        file.write("|".join(distinct([180_000] + [100] * 25)))
    assert main(["text", "--input=in.txt", "--name=n", "--tokenizer=bytes", "--separator=|", "--split=documents"]) == 0
    out = capsys.readouterr().out
    assert "note: val is 1.37% of the text: whole documents come no nearer to 10%, --split=tail does" in out
    assert "val is 1.37% of the text" in out
    assert main(["text", "--input=in.txt", "--name=t", "--tokenizer=bytes", "--separator=|"]) == 0
    out = capsys.readouterr().out
    assert "split by tail (one document is 98.6% of the text)" in out
    assert "val is 10% of the text" in out
    assert main(["text", "--input=in.txt", "--dry_run=true", "--tokenizer=bytes", "--separator=|"]) == 0
    assert "split by tail (one document is 98.6% of the text)\n" in capsys.readouterr().out


def test_one_document_cannot_be_split_by_documents():
    with pytest.raises(UserError, match=r"--split=documents.*--split=tail"):
        prepared("only one", "--split=documents")


def test_shakespeare_char_ids_equal_nanogpts():
    if not SHAKESPEARE.is_file():
        pytest.skip("tinyshakespeare.txt is not on this machine")
    assert main(["shakespeare", f"--input={SHAKESPEARE}", "--tokenizer=char"]) == 0
    dataset = open_dataset("data/shakespeare")
    content = SHAKESPEARE.read_text(encoding="utf-8")
    alphabet = sorted(set(content))
    assert (dataset.tokenizer.vocab_size, dataset.tokenizer.eos_id) == (66, 65)
    assert (len(dataset.train), len(dataset.val)) == (1 + 1_003_854, 111_540 + 1)
    assert dataset.train.read(0, 6).tolist() == [65] + [alphabet.index(char) for char in "First"]
    assert dataset.val.read(0, 111_540).tolist() == [alphabet.index(char) for char in content[1_003_854:]]


def test_python_stdlib(capsys):
    assert main(["python_stdlib", "--vocab_size=512"]) == 0
    dataset = open_dataset("data/python_stdlib")
    train, val = (dataset.meta["shards"][split][0] for split in ("train", "val"))
    assert val["documents"] >= 30
    assert val["bytes"] >= 0.05 * (train["bytes"] + val["bytes"])
    assert dataset.tokenizer.vocab_size == 512
    corpus = python_stdlib.corpus()
    paths = python_stdlib.source_files(python_stdlib.Path(python_stdlib.sysconfig.get_paths()["stdlib"]))
    assert not {part for path in paths for part in path.parts[-3:-1]} & python_stdlib.EXCLUDED
    assert list(corpus.pieces()) == list(corpus.pieces())
    assert "python train.py --data=python_stdlib" in capsys.readouterr().out


# Sources


def test_newlines_are_kept_and_a_byte_order_mark_is_removed():
    dataset = prepared("\ufeffa\r\nb\rc\nend", "--val_fraction=0.1")
    assert dataset.tokenizer.decode(ids_of(dataset.train) + ids_of(dataset.val)) == "a\r\nb\rc\nend"


def test_folder_glob_gzip_and_the_order_of_files(folder):
    (folder / "in" / "b").mkdir(parents=True)
    (folder / "in" / ".git").mkdir()
    files = {"b/1.txt": "B1", "a.txt": "A", "z.md": "Z", ".hidden": "no", ".git/x": "no", "empty.txt": ""}
    for name, content in files.items():
        (folder / "in" / name).write_text(content, encoding="utf-8")
    (folder / "in" / "c é.txt.gz").write_bytes(gzip.compress(b"C", mtime=0))
    assert list(text.corpus("in").pieces()) == [("A", True), ("B1", True), ("C", True), ("Z", True)]
    assert list(text.corpus("in/**/*.txt").pieces()) == [("A", True), ("B1", True)]
    assert text.corpus("in/c é.txt.gz").name == "c é"
    assert text.corpus("in/*.txt").name == text.corpus("in/").name == "in"
    (folder / "in" / "[1].txt").write_text("bracket", encoding="utf-8")
    assert list(text.corpus("in/[1].txt").pieces()) == [("bracket", True)]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("piped in, 文\n".encode() * 20)))
    for nameless in ("-", "/dev/stdin"):
        with pytest.raises(UserError, match="--name=NAME"):
            main(["text", f"--input={nameless}", "--tokenizer=bytes"])
    assert main(["text", "--input=-", "--name=p", "--tokenizer=bytes"]) == 0
    assert open_dataset("data/p").tokenizer.decode(open_dataset("data/p").train.read(0, 8)) == "piped i"


def test_other_encodings():
    for encoding in ("gb18030", "utf-16", "latin-1"):
        content = "café, " * 50 if encoding == "latin-1" else "处处闻啼鸟" * 50
        with open("in.txt", "w", encoding=encoding) as file:
            file.write(content)
        assert "".join(piece for piece, _ in text.corpus("in.txt", encoding).pieces()) == content


@pytest.mark.parametrize(
    ("data", "flags", "message"),
    [
        ("春眠不觉晓，处处闻啼鸟".encode("gb18030"), [], r"byte 0xb4 in line 1 .*(?s:.*)--encoding=gb18030"),
        (b"x" * (1 << 20) + "é".encode()[:1] + b"x", [], rf"byte offset {1 << 20}"),
        (b"x" * ((1 << 20) - 1) + "é".encode()[:1] + b"x", [], rf"byte offset {(1 << 20) - 1}"),
        (b"ab\xc3", [], r"in.txt: ends in the middle of a character of utf-8(?s:.*)--encoding=auto"),
        (b"ab\xff", ["--encoding=gb18030"], r"not gb18030: byte 0xff in line 1 .byte offset 2"),
        ("hi".encode("utf-16"), [], r"--encoding=utf-16"),
        (b"\x89PNG\0\0", [], r"in.txt: is an image, not plain text"),
        (b"ab\0cd", [], r"in.txt: is not text in any encoding: a binary file"),
        (b"", [], r"in.txt: contains no text"),
        (b"\n \n", [], r"in.txt: contains no text"),
        (b"x", [], r"one character long"),
        (b"\x1f\x8b\x08garbage", [], r"in.txt: damaged gzip file"),
        (gzip.compress(b"text" * 500, mtime=0)[:-9], [], r"in.txt: damaged gzip file"),
        (b"text", ["--encoding=utf-9"], r"--encoding=utf-9: .*try utf-8"),
        (b"text", ["--encoding=rot13"], r"--encoding=rot13: .*try utf-8"),
        (b"text", ["--tokenizer=btyes"], r"did you mean bytes"),
        (b"text", ["--name=../x"], r"--name='../x' cannot name a dataset"),
        (b"text", ["--separator="], r"--separator must not be empty"),
        (b"text", ["--val_fraction=0"], r"val_fraction"),
    ],
)
def test_bad_input_raises_and_nothing_is_written(data, flags, message, folder):
    (folder / "in.txt").write_bytes(data)
    with pytest.raises(UserError, match=message):
        main(["text", "--input=in.txt", *flags])
    assert not [path for path in files_under(folder) if path.startswith("data/")]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["text", "--input=missing.txt"], "missing.txt: no such file"),
        (["text"], "--input=FILE"),
        (["txet", "--input=x"], "txet: no such source; did you mean text?"),
        (["python_stdlib", "--input=x"], "use the source text"),
        (["text", "--input=in"], "contains no files"),
    ],
)
def test_bad_command(argv, message, folder):
    (folder / "in").mkdir()
    with pytest.raises(UserError) as caught:
        main(argv)
    assert message in str(caught.value)


def test_separator():
    expected = {r"\n": "\n", r"a\tb": "a\tb", r"\\n": "\\n", r"\x\n": "\\x\n", "--\\": "--\\"}
    assert {text: unescape(text) for text in expected} == expected
    assert list(documents(iter(["a||b|", "|c", "||||"]), "||")) == [("a", True), ("b", True), ("c", True)]


@given(st.text(alphabet="ab |\n", max_size=200), st.integers(1, 9), st.sampled_from([None, "|", "\n|"]))
@settings(deadline=None)
def test_pieces_joined_are_the_documents(content, chunk, separator):
    before, sources.PIECE = sources.PIECE, 8
    try:
        pieces = list(documents((content[i : i + chunk] for i in range(0, len(content), chunk)), separator))
    finally:
        sources.PIECE = before
    whole, current = [], ""
    for piece, ends in pieces:
        assert piece
        assert len(piece) <= 16 + chunk
        current += piece
        if ends:
            whole.append(current)
            current = ""
    assert current == ""
    expected = content.split(separator) if separator else [content]
    assert [text for text in whole if text.strip()] == [text for text in expected if text.strip()]


def test_a_long_document_has_the_same_ids_when_read_in_pieces(monkeypatch):
    content = "".join(f"line {i}: if x{i}: return {i * i}\n\n" for i in range(3000))
    whole = prepared(content, "--tokenizer=bpe", "--vocab_size=400", name="whole")
    monkeypatch.setattr(sources, "PIECE", 1000)
    monkeypatch.setattr(encodings, "CHUNK", 777)
    assert max(len(piece) for piece, _ in text.corpus("in.txt").pieces()) <= 2000
    pieces = prepared(content, "--tokenizer=data/whole/dataset.json", name="pieces")
    assert ids_of(pieces.train) == ids_of(whole.train)


class TruncatingHandler(http.server.BaseHTTPRequestHandler):
    """Announces the whole body and sends its first `sent` bytes."""

    body = b"First Citizen:\n" * 100
    sent = len(body)

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body[: self.sent])

    def log_message(self, *args):
        pass


def test_download(monkeypatch, folder):
    server = http.server.HTTPServer(("127.0.0.1", 0), TruncatingHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(shakespeare, "ADDRESS", f"http://127.0.0.1:{server.server_port}/input.txt")
    options = PrepareOptions(tokenizer="bytes")
    try:
        with pytest.raises(UserError, match=r"could not be downloaded \(the server sent another file.*expected sha256"):
            resolve_data("shakespeare", options)
        monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(TruncatingHandler.body).hexdigest())
        monkeypatch.setattr(TruncatingHandler, "sent", 700)
        # the connection closes too early
        with pytest.raises(UserError, match=r"^use a text of your own.*or save .*tinyshakespeare.txt.*broke off"):
            resolve_data("shakespeare", options)
        assert files_under(folder / "data") == ["downloads"]
        monkeypatch.setattr(TruncatingHandler, "sent", len(TruncatingHandler.body))
        assert len(resolve_data("shakespeare", options).train) == 1 + 1350
    finally:
        server.shutdown()
        server.server_close()
    assert len(resolve_data("shakespeare", options).train) == 1 + 1350, "the second time needs no network"


# Names of datasets

NAMES = {
    "Dune: Part One": "Dune_ Part One",
    "Who am I?": "Who am I",
    ".hidden": "hidden",
    "--dash": "dash",
    "~home": "home",
    "ends. . ": "ends",
    "a\nb\x1b/\\c": "a_b_c",
    "???": "text",
    "": "text",
    "..": "text",
    "downloads": "text_downloads",
    "Downloads?": "text_Downloads",
    "CON": "text_CON",
    "nul.2024": "text_nul.2024",
    "com1": "text_com1",
    "caf\udce9": "caf",
    "文" * 100: "文" * 66,
    "x" * 300: "x" * 200,
    "x" * 199 + ". .y": "x" * 199,
}


def test_safe_names():
    assert {name: folders.safe_name(name) for name in NAMES} == NAMES
    for name in (
        "notes",
        "console",
        "Мои заметки",
        "ملاحظات",
        "日記",
        "a.b-c_d~",
        "می‌خواهم",
        "💩",
        "it's 50% [new] $1",
    ):
        assert folders.safe_name(name) == name == folders.check_name(name)


@given(st.text(max_size=300) | st.text(alphabet=".:?*~- \0\nco1un", max_size=12))
@settings(max_examples=100, deadline=None)
def test_a_safe_name_is_accepted(name):
    safe = folders.safe_name(name)
    assert folders.check_name(safe) == safe
    assert safe.strip() == safe
    assert 0 < len(safe.encode()) <= 200
    assert not set(safe) & set(folders.FORBIDDEN)
    if safe != name:
        with pytest.raises(UserError, match="--name="):
            folders.check_name(name)


@pytest.mark.parametrize(
    "name", ["Who am I?", ".env", "-x", "downloads", "文" * 80, b"caf\xe9 \xff".decode(errors="surrogateescape")]
)
def test_a_file_of_any_name_is_prepared(name, folder, capsys):
    try:
        (folder / f"{name}.txt").write_text("some text " * 30, encoding="utf-8")
    except OSError:
        pytest.skip("this system has no such file names")
    assert main(["text", f"--input={name}.txt", "--tokenizer=bytes"]) == 0
    data = shlex.split(capsys.readouterr().out.rpartition("next: python train.py ")[2])[0].removeprefix("--data=")
    readable = os.fsencode(f"{name}.txt").decode(errors="replace")
    assert resolve_data(data, PrepareOptions()).meta["source"]["origin"] == readable
    dataset = resolve_data(f"{name}.txt", PrepareOptions(tokenizer="char"))
    assert dataset.folder.parent == Path("data")


def test_a_name_that_was_given_is_not_changed():
    message = r"--name='a:b' cannot name a dataset: .* try --name=a_b"
    with pytest.raises(UserError, match=message):
        prepared("some text " * 30, name="a:b")


# Datasets on disk


def test_an_equal_request_reuses_the_dataset_and_another_one_is_refused(capsys, folder):
    prepared("some text " * 50)
    before = (folder / "data" / "d" / "dataset.json").stat().st_mtime_ns
    prepared("some text " * 50)
    assert "already prepared" in capsys.readouterr().out
    assert (folder / "data" / "d" / "dataset.json").stat().st_mtime_ns == before
    for content, flag, difference in (
        ("other text", "--val_fraction=0.1", "the text"),
        ("some text " * 50, "--val_fraction=0.2", "val_fraction"),
    ):
        with pytest.raises(UserError, match=rf"differs in {difference};.*--name.*--overwrite=true"):
            prepared(content, flag)
    assert len(prepared("other text", "--overwrite=true").train) == 10
    assert files_under(folder / "data") == ["d", "d/dataset.json", "d/train_000000.bin", "d/val_000000.bin"]


def test_a_folder_that_is_not_a_dataset_is_not_overwritten(folder):
    (folder / "data" / "d").mkdir(parents=True)
    (folder / "data" / "d" / "thesis.txt").write_text("years", encoding="utf-8")
    for flag in ("--overwrite=true", "--overwrite=false"):
        with pytest.raises(UserError, match="not a Sprout dataset"):
            prepared("text", flag)
    assert (folder / "data" / "d" / "thesis.txt").read_text(encoding="utf-8") == "years"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_run_leaves_no_files(error, monkeypatch, folder):
    def stop(*args):
        raise error

    old = ids_of(prepared("the old one " * 30, name="kept").train)
    monkeypatch.setattr(pipeline, "write_dataset", stop)
    for name, flag in (("new", "--overwrite=false"), ("kept", "--overwrite=true")):
        if error is KeyboardInterrupt:
            assert main(["text", "--input=in.txt", f"--name={name}", "--tokenizer=bytes", flag]) == 130
        else:
            with pytest.raises(UserError, match="No space left on device"):
                prepared("new", flag, name=name)
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["kept"]
    assert ids_of(open_dataset("data/kept").train) == old


def pid_of_a_dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot test whether a process is alive without harming it")
def test_temporary_folders_of_dead_processes_are_removed(monkeypatch, folder):
    old = ids_of(prepared("the old one " * 30, name="kept").train)
    with monkeypatch.context() as patch:
        patch.setattr(folders.os, "getpid", pid_of_a_dead_process)
        replaced = folders.temporary(folder / "data", "old")
        folders.temporary(folder / "data").joinpath("train_000000.bin").write_bytes(b"half")
    (folder / "data" / "kept").rename(replaced / "kept")  # as if killed between the two renames of an overwrite
    in_use = folders.temporary(folder / "data")
    prepared("something else", name="other")
    assert sorted(path.name for path in (folder / "data").iterdir()) == sorted(["kept", "other", in_use.name])
    assert ids_of(open_dataset("data/kept").train) == old


def test_two_concurrent_preparations_of_one_dataset(monkeypatch, folder):
    first = write = pipeline.write_dataset

    def write_after_another(*args):
        nonlocal first
        write(*args)
        if first:
            first = None
            prepared("the same text " * 20)

    monkeypatch.setattr(pipeline, "write_dataset", write_after_another)
    assert len(prepared("the same text " * 20).train) == 253
    assert sorted(path.name for path in (folder / "data").iterdir()) == ["d"]


def test_dry_run_writes_nothing(folder, capsys):
    (folder / "in.txt").write_text("Call me Ishmael. " * 100, encoding="utf-8")
    assert main(["text", "--input=in.txt", "--dry_run=true", "--tokenizer=bytes"]) == 0
    out = capsys.readouterr().out
    for part in (
        "1 document, 1,700 characters, 1,700 bytes",
        "1.00 bytes a token",
        "split by tail (fewer than 20 documents)",
        "1,530 characters (90.0%), 1,530 tokens",
        "Call me Ishmael. Call",
    ):
        assert part in out
    assert files_under(folder) == ["in.txt"]


def test_a_tiny_file_and_small_shards(capsys):
    tiny = prepared("To be, or not to be, that is the question. 生存还是毁灭\n" * 5, "--tokenizer=bpe", name="tiny")
    assert 257 < tiny.tokenizer.vocab_size < 400
    assert "yields only" in capsys.readouterr().out
    both = tiny.tokenizer.decode(ids_of(tiny.train)) + tiny.tokenizer.decode(ids_of(tiny.val))
    assert both == "To be, or not to be, that is the question. 生存还是毁灭\n" * 5
    small = prepared("abcdefgh" * 20, "--shard_tokens=50", name="small")
    assert len(small.train.shards) == 3
    assert bytes(ids_of(small.train)[1:]) == b"abcdefgh" * 18


def test_bpe_is_trained_on_the_train_split_only():
    dataset = prepared("abcdefgh " * 200 + "QXQX" * 45, "--tokenizer=bpe", "--split=tail")
    assert b"abcdefgh" in b" ".join(dataset.tokenizer.token_bytes)
    assert not any(b"QX" in token for token in dataset.tokenizer.token_bytes)


def test_preparation_is_reproducible(folder):
    for name in ("a", "b"):
        prepared("".join(f"{i} bottles of beer\n" for i in range(500)), "--tokenizer=bpe", "--separator=\\n", name=name)
    first, second = ((folder / "data" / name) for name in "ab")
    assert files_under(first) == files_under(second)
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files_under(first))


def test_help_without_a_source(capsys):
    for argv in ([], ["--help"], ["text", "--help"]):
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 0
        assert "--separator" in capsys.readouterr().out


# What train.py calls


def test_text_is_prepared_once_and_reused(folder, monkeypatch, capsys):
    (folder / "my növel.txt").write_text("It was a dark and stormy night. " * 60, encoding="utf-8")
    options = PrepareOptions(tokenizer="bpe", vocab_size=300)
    first = resolve_data("my növel.txt", options)
    assert first.name.startswith("my növel-")
    assert f"preparing my növel.txt in {first.folder}" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "train_bpe", None)
        assert resolve_data("my növel.txt", options).fingerprint == first.fingerprint
        assert resolve_data(first.name, options).fingerprint == first.fingerprint
        assert resolve_data(str(first.folder), options).fingerprint == first.fingerprint
    seen = {first.name}
    changes = [{"vocab_size": 290}, {"split_pattern": "gpt2"}, {"val_fraction": 0.2}, {"split": "tail"}]
    for changed in [*changes, {"tokenizer": "char"}]:
        seen.add(resolve_data("my növel.txt", dataclasses.replace(options, **changed)).name)
    (folder / "my növel.txt").write_text("The night was sultry. " * 60, encoding="utf-8")
    seen.add(resolve_data("my növel.txt", options).name)
    seen.add(resolve_data("my növel.txt", options, tokenizer=first.tokenizer).name)
    assert len(seen) == 8
    assert sorted(path.name for path in (folder / "data").iterdir()) == sorted(seen)


def test_a_given_tokenizer_is_used(folder):
    (folder / "letters.txt").write_text("Dear mother, " * 60, encoding="utf-8")
    own = char_tokenizer("Dear mothr,\n")
    assert resolve_data("letters.txt", PrepareOptions(), own).tokenizer.content_hash == own.content_hash
    with pytest.raises(UserError, match=r"60 of the text's 780 \(7\.69%\) are others: 'D' \(60\)"):
        resolve_data("letters.txt", PrepareOptions(), char_tokenizer("ear mothr,"))
    prepared("some text " * 30, name="ready")
    assert resolve_data("ready", PrepareOptions(), bytes_tokenizer()).tokenizer.name == "bytes"
    with pytest.raises(UserError, match=r"tokenizer bytes \(257 ids, \w+\).*char \(12 ids"):
        resolve_data("ready", PrepareOptions(), own)


def test_a_flag_of_preparation_for_a_prepared_dataset_is_refused_unless_it_was_prepared_so(folder):
    prepared("some text\n" * 30, name="ready")
    stored = open_dataset("data/ready").meta["options"]
    changes = {"val_fraction": 0.2, "split": "tail", "encoding": "cp1252", "separator": "\n", "exclude": ("*.md",)}
    for name, value in changes.items():
        options = dataclasses.replace(PrepareOptions(**{**stored, "exclude": ()}), **{name: value})
        with pytest.raises(UserError, match=rf"--{name}=.*data/ready is prepared already, with {name}="):
            resolve_data("ready", options, flags={name})
        assert resolve_data("ready", options, flags=set()), "a preset's value is no mistake of the user's"
        same = PrepareOptions(**{**stored, "exclude": ()})
        assert resolve_data("ready", same, flags={name})


def test_python_stdlib_as_data(monkeypatch, folder):
    few = python_stdlib.source_files(python_stdlib.Path(python_stdlib.sysconfig.get_paths()["stdlib"]))[:25]
    monkeypatch.setattr(python_stdlib, "source_files", lambda folder: few)
    dataset = resolve_data("python_stdlib", PrepareOptions(tokenizer="bytes"))
    assert dataset.name.startswith("python_stdlib-")
    assert dataset.fingerprint == resolve_data("python_stdlib", PrepareOptions(tokenizer="bytes")).fingerprint
    few.clear()
    with pytest.raises(UserError, match="--data=FILE_OR_FOLDER"):
        resolve_data("python_stdlib", PrepareOptions())


def write(name, content):
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize("data", ["diary", "diary/", "./diary"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_a_path_comes_before_a_dataset_of_that_name(data, is_folder, capsys):
    if data.endswith("/") and not is_folder:
        return
    options = PrepareOptions(tokenizer="bytes")
    file = "diary/1.txt" if is_folder else "diary"
    write(file, "Dear diary, " * 50)
    flags = ["--tokenizer=bytes", "--val_fraction=0.2", r"--separator=\n"]
    assert main(["text", "--input=diary", *flags]) == 0
    assert "next: python train.py --data=data/diary\n" in capsys.readouterr().out, "which is taken as a dataset"
    assert resolve_data(data, options).folder == Path("data/diary")
    kind = "folder" if is_folder else "file"
    assert f"data/diary is taken: it was prepared from the {kind} diary as that is now" in capsys.readouterr().out
    changes = {"val_fraction": PrepareOptions(tokenizer="bytes", val_fraction=0.3)}
    changes |= {"tokenizer": PrepareOptions(tokenizer="char")}
    for flag, changed in changes.items():
        assert resolve_data(data, changed, flags={flag}).folder != Path("data/diary")
        assert f"which was prepared with another --{flag}" in capsys.readouterr().out
    assert resolve_data(data, options, char_tokenizer("Dear diary,\n")).folder != Path("data/diary")
    assert "which has another tokenizer (bytes) than the model" in capsys.readouterr().out
    write(file, "Dear diary, one day later: " * 50)
    dataset = resolve_data(data, options)
    assert dataset.folder.name.startswith("diary-")
    assert dataset.meta["bytes"] == 27 * 50
    out = capsys.readouterr().out
    assert f"the {kind} diary is taken: a path that exists comes before the dataset data/diary" in out
    assert "prepared from other text\n  for that dataset: --data=data/diary\n" in out
    assert resolve_data("data/diary", options).folder == Path("data/diary")
    assert "is taken" not in capsys.readouterr().out


def test_a_path_comes_before_a_built_in_source_and_a_damaged_dataset(folder, capsys):
    write("shakespeare/1.txt", "All the world's a stage, " * 50)
    options = PrepareOptions(tokenizer="bytes")
    assert resolve_data("shakespeare", options).meta["bytes"] == 25 * 50
    assert "comes before Sprout's own text of that name" in capsys.readouterr().out
    write("data/shakespeare/dataset.json", "{}")
    assert resolve_data("shakespeare", options).meta["bytes"] == 25 * 50
    assert "comes before the dataset data/shakespeare, which was not prepared from it" in capsys.readouterr().out


def test_a_missing_path_is_not_a_dataset_of_that_name(folder):
    prepared("some text " * 30, name="notes")
    options = PrepareOptions(tokenizer="bytes")
    assert resolve_data("notes", options).folder == Path("data/notes")
    for data in ("./notes", "../notes", str(folder / "notes"), "", "once upon a time " * 50):
        with pytest.raises(UserError, match="no dataset, file or folder of that name"):
            resolve_data(data, options)


def test_a_folder_that_cannot_be_read_is_an_error(monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    write("notes/1.txt", "some text")
    monkeypatch.setattr("prepare_data.resolve.is_dataset", refuse)
    with pytest.raises(UserError, match=r"--data=notes: notes cannot be read \(Permission denied\)"):
        resolve_data("notes", PrepareOptions())


def test_files_and_folders_of_datasets_are_not_text(folder):
    prepared("some text " * 30, name="notes")
    for data, advice in (("data/notes/train_000000.bin", "--data=data/notes"), ("data", "--data=data/notes")):
        with pytest.raises(UserError, match=rf"--data={data}: .*dataset.*{advice}"):
            resolve_data(data, PrepareOptions())


def test_unknown_data_raises_with_a_suggestion(folder):
    prepared("some text", name="notes")
    with pytest.raises(UserError, match=r"--data=ntoes.*did you mean notes\?.*Datasets there: notes"):
        resolve_data("ntoes", PrepareOptions())


def test_a_damaged_dataset_is_not_silently_prepared_again(folder):
    (folder / "t.txt").write_text("some text " * 30, encoding="utf-8")
    dataset = resolve_data("t.txt", PrepareOptions(tokenizer="bytes"))
    (dataset.folder / "train_000000.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=r"train_000000.bin.*delete this dataset's folder"):
        resolve_data("t.txt", PrepareOptions(tokenizer="bytes"))


@pytest.mark.parametrize("piece", [700, SLICE, 10**7])
@pytest.mark.parametrize("characters", [5000, SAMPLE_CHARACTERS, 7_654_321])
def test_a_sample_is_from_all_over_the_text_and_no_longer_than_it_may_be(piece, characters):
    text = "".join(f"{number:07}" for number in range(0, characters, 7))[:characters]
    sample = Sample()
    for start in range(0, characters, piece):
        sample.add(text[start : start + piece])
    assert min(characters, SAMPLE_CHARACTERS // 2) <= sample.characters == sum(map(len, sample.slices))
    assert sample.characters <= SAMPLE_CHARACTERS
    joined = "".join(sample.slices)
    if characters <= SAMPLE_CHARACTERS:
        assert joined == text
    else:
        places = [text.index(one[:14]) for one in sample.slices]
        gaps = [after - before for before, after in itertools.pairwise([0, *places, characters])]
        assert max(gaps) < 3 * characters * SLICE / sample.characters


def test_counts_match_the_text(folder):
    (folder / "t.txt").write_text("日本語 text\nmore", encoding="utf-8")
    corpus = make_corpus("text", "t.txt", PrepareOptions())
    counts = count(corpus, alphabet=True)
    assert (counts.documents, counts.characters, counts.bytes) == (1, 13, 19)
    assert counts.alphabet == set("日本語 text\nmore")
    assert counts.sample.slices == ["日本語 text\nmore"]
    rule = choose_rule(counts, PrepareOptions(val_fraction=0.5))
    assert (rule.name, rule.limit) == ("tail", 6)
    groups = itertools.groupby(rule.pieces(corpus), lambda piece: piece.split)
    assert ["".join(piece.text for piece in group) for _, group in groups] == ["日本語 te", "xt\nmore"]


def test_dataset_json_records_source_options_and_counts(folder):
    prepared("some text " * 30)
    meta = json.loads((folder / "data" / "d" / "dataset.json").read_text(encoding="utf-8"))
    assert meta["source"] == {"name": "in", "origin": "in.txt"}
    assert (meta["options"]["val_fraction"], meta["characters"]) == (0.1, 300)
