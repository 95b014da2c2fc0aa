"""sample.py --score: the definition, what is read and refused, and the three outputs."""

import csv
import gzip
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from common.hardware import choose_hardware
from common.options import HardwareOptions
from common.tokenizer import bytes_tokenizer, char_tokenizer
from errors import UserError
from generation.options import SampleScriptOptions
from generation.score import Row, Scorer, names_of, print_scores, total_of
from generation.text import load_model
from model import GPT
from prepare_data import PrepareOptions, TextOptions
from prepare_data.resolve import resolve_data
from tests.test_sample import CPU, save
from training.evaluation import evaluate

T = 16
TEXT = "Once upon a time\r\nthere wäre 世界, and then nothing at all.\n" * 3


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    home = tmp_path_factory.mktemp("runs")
    save(home / "bytes", 10, bytes_tokenizer(), seed=3, val_loss=1.25)
    save(home / "char", 10, char_tokenizer(TEXT), seed=4)
    save(home / "documents", 10, bytes_tokenizer(), seed=5, document_mask=True, max_ngram=3, ngram_rows=64)
    return home


def start(capsys, *argv):
    assert sample.main([*argv, "--dtype=float32"]) == 0
    return capsys.readouterr()


def bad(capsys, *argv):
    with pytest.raises(UserError) as error:
        sample.main(list(argv))
    assert capsys.readouterr().out == "", "the error comes before any score"
    return str(error.value)


def rows_of(output):
    return list(csv.DictReader(io.StringIO(output.out)))


def definition(run, text, stride=T, eos=True):
    """(nats, byte length) of each target, token by token in float64: −log softmax of the logits of what it sees."""
    model, tokenizer = load_model(next(run.glob("checkpoints/*/model")), CPU)
    model.double()
    ids = np.array([tokenizer.eos_id, *tokenizer.encode(text), *[tokenizer.eos_id] * eos])
    pairs = []
    for target in range(1, len(ids)):
        start = 0 if target <= T else -(-(target - T) // stride) * stride
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[None, start:target]))[0, -1]
        nats = -float(torch.log_softmax(logits, dim=-1)[ids[target]])
        pairs.append((nats, len(tokenizer.token_bytes[ids[target]])))
    return pairs


@pytest.mark.parametrize("run", ["bytes", "char", "documents"])
@pytest.mark.parametrize("stride", [None, 16, 5, 1])
@pytest.mark.parametrize("eos", [True, False])
def test_a_score_is_the_definition(runs, capsys, tmp_path, run, stride, eos):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    pairs = definition(runs / run, TEXT, stride or T, eos)
    flags = [f"--run={runs / run}", f"--score={path}", f"--score_end={eos}"]
    flags += [] if stride is None else [f"--eval_stride={stride}"]
    [row] = rows_of(start(capsys, *flags, "--output=csv"))
    nats, n_bytes = sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)
    assert (row["file"], row["document"]) == (str(path), "")
    assert (int(row["tokens"]), int(row["bytes"])) == (len(pairs), len(TEXT.encode())) == (len(pairs), n_bytes)
    assert float(row["bits_per_byte"]) == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-5)
    assert float(row["nats_per_token"]) == pytest.approx(nats / len(pairs), rel=1e-5)
    lines = [json.loads(line) for line in start(capsys, *flags, "--output=jsonl").out.splitlines()]
    assert [line["nats"] for line in lines] == pytest.approx([pair[0] for pair in pairs], rel=1e-4)
    assert [line["position"] for line in lines] == list(range(len(pairs)))
    assert [line["offset"] for line in lines] == np.cumsum([0, *(pair[1] for pair in pairs)])[:-1].tolist()
    assert {line["file"] for line in lines} == {str(path)}
    if run == "char":
        assert "".join(line["text"] for line in lines) == TEXT


def test_documents_are_scored_on_their_own(runs, capsys, tmp_path):
    """Whatever the file, the order and the neighbors, and also where the file is read in pieces."""
    documents = ["short", "a longer document, of more than one window of tokens", "x", "short", "世"]
    (tmp_path / "all.txt").write_bytes("\n\n\n".join(documents).encode())
    flags = f"--run={runs / 'bytes'}", "--output=csv"
    together = rows_of(start(capsys, *flags, f"--score={tmp_path / 'all.txt'}", r"--separator=\n"))
    assert [row["beginning"] for row in sorted(together, key=lambda row: int(row["document"]))] == documents
    scores = [float(row["bits_per_byte"]) for row in together]
    assert scores == sorted(scores)
    for row in together:
        path = tmp_path / "alone.txt"
        path.write_text(row["beginning"], encoding="utf-8")
        [alone] = rows_of(start(capsys, *flags, f"--score={path}"))
        assert float(alone["bits_per_byte"]) == pytest.approx(float(row["bits_per_byte"]), rel=1e-5)
        assert (alone["tokens"], alone["bytes"]) == (row["tokens"], row["bytes"])
    assert together[0]["standard_error"] == "" or float(together[0]["standard_error"]) > 0
    lines = start(capsys, f"--run={runs / 'bytes'}", f"--score={tmp_path / 'all.txt'}", r"--separator=\n").out
    assert len(lines.splitlines()) == 1 + 5 + 1 + 1
    tokens = start(capsys, flags[0], f"--score={tmp_path / 'all.txt'}", r"--separator=\n", "--output=jsonl").out
    assert {json.loads(line)["document"] for line in tokens.splitlines()} == {1, 2, 3, 4, 5}


def test_files_larger_than_a_piece_are_scored_whole(runs, capsys, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8", newline="")
    flags = f"--run={runs / 'char'}", f"--score={path}", "--output=csv"
    [whole] = rows_of(start(capsys, *flags))
    monkeypatch.setattr("prepare_data.sources.PIECE", 20)
    monkeypatch.setattr("prepare_data.sources.encodings.CHUNK", 7)
    [pieces] = rows_of(start(capsys, *flags))
    assert {**pieces, "beginning": ""} == {**whole, "beginning": ""}


class Tokens:
    def __init__(self, ids):
        self.ids = np.asarray(ids)

    def __len__(self):
        return len(self.ids)

    def read(self, start, count):
        return self.ids[start : start + count]

    def mask(self, start, count):
        return None


@pytest.mark.parametrize("stride", [None, 5])
def test_the_score_of_a_document_is_the_val_loss_of_a_split_of_it(runs, tmp_path, stride):
    (tmp_path / "a.txt").write_bytes((TEXT * 20).encode())
    model, tokenizer = load_model(next((runs / "bytes").glob("checkpoints/*/model")), CPU)
    autocast = choose_hardware(HardwareOptions(dtype="float32")).autocast
    split = Tokens([tokenizer.eos_id, *tokenizer.encode(TEXT * 20), tokenizer.eos_id])
    val = evaluate(model, split, tokenizer.token_bytes, autocast=autocast, stride=stride)
    script = SampleScriptOptions(score=(str(tmp_path / "a.txt"),), eval_stride=stride)
    scorer = Scorer(model, tokenizer, script, TextOptions())
    scorer.run(autocast)
    [row] = scorer.rows
    assert (row.bits_per_byte, row.nats_per_token) == pytest.approx((val.bits_per_byte, val.loss), rel=1e-12)
    assert row.tokens == val.targets
    if stride is None:  # blocks of windows are blocks of the text; a token is a byte
        assert row.standard_error() == pytest.approx(val.standard_error / math.log(2), rel=0.02)


def test_the_scores_of_documents_are_the_val_loss_of_a_prepared_split(tmp_path):
    """Where windows agree: documents that end with a window, and a model that does not see the document before."""
    save(tmp_path / "run", 1, bytes_tokenizer(), seed=2, document_mask=True)
    (tmp_path / "all.txt").write_text("\n".join(f"line {i:10}" for i in range(10, 70)), encoding="utf-8")
    prepare = PrepareOptions(tokenizer="bytes", separator="\n", data_dir=str(tmp_path / "data"))
    dataset = resolve_data(str(tmp_path / "all.txt"), prepare)
    model, tokenizer = load_model(next((tmp_path / "run").glob("checkpoints/*/model")), CPU)
    autocast = choose_hardware(HardwareOptions(dtype="float32")).autocast
    val = evaluate(model, dataset.val, tokenizer.token_bytes, autocast=autocast)
    text = tokenizer.decode(dataset.val.read(0, len(dataset.val)).tolist())
    documents = [text[i : i + T - 1] for i in range(0, len(text), T - 1)]  # with its EOS each is a window
    (tmp_path / "val.txt").write_text("\n".join(documents), encoding="utf-8")
    scorer = Scorer(
        model, tokenizer, SampleScriptOptions(score=(str(tmp_path / "val.txt"),)), TextOptions(separator="\n")
    )
    scorer.run(autocast)
    total, error = total_of(scorer.rows)
    assert (total.bits_per_byte, total.nats_per_token) == pytest.approx((val.bits_per_byte, val.loss), rel=1e-6)
    assert total.tokens == val.targets
    assert error > 0


# ---- what is read


def test_files_folders_globs_archives_and_standard_input(runs, capsys, tmp_path, monkeypatch):
    folder = tmp_path / "letters"
    folder.mkdir()
    for name, text in {"a.txt": "abc", "b.md": "bcd", "c.txt": "\n \n"}.items():
        (folder / name).write_text(text)
    (folder / "picture.png").write_bytes(b"\x89PNG\0")
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"\xef\xbb\xbfdef"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("stdin".encode("utf-16"))))
    sources = [folder, f"{folder}/*.md", tmp_path / "d.txt.gz", "-"]
    output = start(
        capsys, f"--run={runs / 'bytes'}", *(f"--score={path}" for path in sources), "--output=csv", "--encoding=auto"
    )
    assert sorted((row["file"], row["beginning"]) for row in rows_of(output)) == sorted(
        [
            (str(folder / "a.txt"), "abc"),
            (str(folder / "b.md"), "bcd"),
            (str(folder / "b.md"), "bcd"),
            (str(tmp_path / "d.txt.gz"), "def"),
            ("standard input", "stdin"),
        ]
    )
    assert "note: skipped files of nothing but white space: 1 (" in output.err
    assert "note: skipped images" in output.err
    assert (
        rows_of(start(capsys, f"--run={runs / 'bytes'}", f"--score={folder}", "--exclude=a.*", "--output=csv"))[0][
            "beginning"
        ]
        == "bcd"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0", "is an image, not plain text"),
        (b"caf\xe9 au lait, monsieur\n", r"not utf-8: byte 0xe9 in line 1 .*\n.*\nUse --encoding="),
        (b"", "nothing but white space"),
        (b" \n\t\n", "nothing but white space"),
        (b"\x1f\x8b\x08\0", "damaged gzip file"),
    ],
)
def test_bad_files(runs, capsys, tmp_path, content, message):
    """Also where the first file could be scored: the error comes first."""
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(content)
    assert re.search(message, bad(capsys, f"--run={runs / 'bytes'}", f"--score={tmp_path / 'b.txt'}"))
    if b"good" not in content and content.strip():
        assert re.search(message, bad(capsys, f"--run={runs / 'bytes'}", f"--score={tmp_path}"))
    assert "no such file or folder" in bad(capsys, f"--run={runs / 'bytes'}", f"--score={tmp_path / 'missing'}")


def test_characters_that_the_tokenizer_lacks_are_left_out_and_counted(runs, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("Once Zupon ZZ1", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Once upon ", encoding="utf-8")
    (tmp_path / "c.txt").write_text("ZZ", encoding="utf-8")
    output = start(capsys, f"--run={runs / 'char'}", f"--score={tmp_path}", "--output=csv")
    one, other, empty = sorted(rows_of(output), key=lambda row: row["file"])
    assert {**one, "file": "", "beginning": ""} == {**other, "file": "", "beginning": ""}
    assert (empty["bits_per_byte"], empty["bytes"], empty["tokens"]) == ("nan", "0", "1")
    assert "a.txt: left out 4 characters that the tokenizer does not know ('Z' '1')" in output.err
    bare = rows_of(start(capsys, f"--run={runs / 'char'}", f"--score={tmp_path}", "--output=csv", "--score_end=false"))
    assert (bare[-1]["bits_per_byte"], bare[-1]["nats_per_token"], bare[-1]["tokens"]) == ("nan", "nan", "0")
    table = start(capsys, f"--run={runs / 'char'}", f"--score={tmp_path}").out
    assert table.splitlines()[3].split()[0] == "-", "a text without a score comes last"


def test_notes(runs, capsys, tmp_path):
    (tmp_path / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
    err = start(capsys, f"--run={runs / 'bytes'}", f"--score={tmp_path}").err
    assert r"note: files whose lines end in \r\n (Windows), scored as they are: 1 (" in err
    assert "the end-of-sequence token is up to" in err
    assert (
        "end-of-sequence"
        not in start(capsys, f"--run={runs / 'bytes'}", f"--score={tmp_path}", "--score_end=false").err
    )


def test_a_text_of_one_token(runs, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    flags = f"--run={runs / 'bytes'}", f"--score={tmp_path / 'a.txt'}", "--output=csv"
    [row], [bare] = rows_of(start(capsys, *flags)), rows_of(start(capsys, *flags, "--score_end=false"))
    assert (row["tokens"], row["bytes"], row["standard_error"]) == ("2", "1", "")
    assert (bare["tokens"], bare["bytes"]) == ("1", "1")


# ---- the table


def test_the_table_is_sorted_and_ends_with_the_total_and_the_val_loss(runs, capsys, tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("abcdefgh" * 20 * (i + 1))
    head, *lines, total, val = start(capsys, f"--run={runs / 'bytes'}", f"--score={tmp_path}").out.splitlines()
    assert head.split() == ["bits/byte", "±", "nats/token", "tokens", "bytes", "text"]
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores)
    assert len(lines) == 5
    assert total.split()[-3:] == ["2,405", "2,400", "all"]
    assert float(total.split()[0]) == pytest.approx(
        np.average(scores, weights=[int(line.split()[4].replace(",", "")) for line in lines]), abs=1e-4
    )
    assert "1.2500" in val
    assert val.endswith("val split, step 10")
    assert [line.split()[-1] for line in lines] == [f"{i}.txt" for i in (4, 3, 2, 1, 0)]


def test_names_lack_the_folders_that_all_share():
    def names(*files, document=None):
        return names_of([Row(str(Path(*file.split("/"))), document, "Once upon") for file in files])

    assert names("a/b/c.txt") == [str(Path("a/b/c.txt"))]
    assert names("a/b/c.txt", "a/b/d.txt") == ["c.txt", "d.txt"]
    assert names("a/b/c.txt", "a/d.txt") == [str(Path("b/c.txt")), "d.txt"]
    assert names("a/b.txt", "standard input", "ab/c.txt") == [
        str(Path("a/b.txt")),
        "standard input",
        str(Path("ab/c.txt")),
    ]
    assert names("a/b.txt", "a/b.txt", document=7) == ["7: Once upon"] * 2
    assert names("a/b.txt", "a/c.txt", document=7) == ["b.txt:7: Once upon", "c.txt:7: Once upon"]


def test_on_a_terminal_lines_fit(runs, capsys, tmp_path, monkeypatch):
    folder = tmp_path / ("a long name of a folder " * 4)
    folder.mkdir()
    (folder / "one.txt").write_text("abc\n" + "a document that begins with many words " * 9)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    run, path = f"--run={runs / 'bytes'}", f"--score={folder / 'one.txt'}"
    files = start(capsys, run, path).out
    documents = start(capsys, run, path, r"--separator=\n").out
    for output in (files, documents):
        assert max(map(len, output.splitlines())) <= 80
    assert re.search(r"  ….*one\.txt\n", files)
    assert re.search(r"  2: a document .*…\n", documents)


def test_a_separator_of_the_training_text_is_pointed_out(runs, capsys, tmp_path):
    model, tokenizer = load_model(next((runs / "bytes").glob("checkpoints/*/model")), CPU)
    (tmp_path / "a.txt").write_text("one\ntwo")
    script, state = SampleScriptOptions(score=(str(tmp_path / "a.txt"),)), {"options": {"separator": "\n"}}
    autocast = choose_hardware(HardwareOptions(dtype="float32")).autocast
    print_scores(model, tokenizer, script, TextOptions(), autocast, state)
    assert r"prepared with --separator='\n'; add it" in capsys.readouterr().err
    print_scores(model, tokenizer, script, TextOptions(separator="\n"), autocast, state)
    assert "separator" not in capsys.readouterr().err


def test_the_error_is_that_of_blocks_of_windows(runs, tmp_path):
    """The spread of the scores of texts of the same kind is about the error of each."""
    model, tokenizer = load_model(next((runs / "bytes").glob("checkpoints/*/model")), CPU)
    for parameter in model.parameters():
        parameter.data *= 3  # predictions that differ
    draw, errors, scores = np.random.default_rng(0), [], []
    for i in range(30):
        letters = draw.integers(97, 123, (60, 1)) + np.zeros(T, dtype=int)  # windows that are alike within
        (tmp_path / f"{i}.txt").write_bytes(bytes(letters.ravel().astype(np.uint8)))
    scorer = Scorer(model, tokenizer, SampleScriptOptions(score=(str(tmp_path),)), TextOptions())
    scorer.run(choose_hardware(HardwareOptions(dtype="float32")).autocast)
    for row in scorer.rows:
        errors.append(row.standard_error())
        scores.append(row.bits_per_byte)
    assert 0.6 < np.mean(errors) / np.std(scores) < 1.6


# ---- options


def test_options_that_contradict_each_other(runs, capsys):
    run = f"--run={runs / 'bytes'}"
    for flag in (
        "--prompt=a",
        "--serve",
        "--interactive",
        "--num_samples=2",
        "--temperature=1",
        "--inspect=x.html",
        "--seed=3",
        "--novelty",
        "--logprobs=3",
    ):
        message = bad(capsys, run, "--score=README.md", flag)
        assert "--score scores texts and draws no samples: remove " + flag.partition("=")[0] in message
    both = bad(capsys, run, "--score=README.md", "--prompt=a", "--top_k=3")
    assert "remove --prompt and --top_k" in both
    assert len(both.splitlines()) == 1
    for flag in ("--score_end=false", "--eval_stride=3", "--separator=x", "--encoding=auto", "--exclude=x"):
        assert f"{flag.partition('=')[0]} concerns --score alone: add --score=FILE" in bad(capsys, run, flag)
    assert "--score= is empty" in bad(capsys, run, "--score=")
    assert "--output=csv is the table of --score" in bad(capsys, run, "--output=csv")
    assert "--eval_stride=17 is more than the model's context" in bad(
        capsys, run, "--score=README.md", "--eval_stride=17"
    )
    assert "eval_stride" in bad(capsys, run, "--score=README.md", "--eval_stride=0")
    assert "write --score=" in bad(capsys, run, "--perplexity=README.md")


def test_weights_that_are_not_finite(capsys, tmp_path, monkeypatch):
    save(tmp_path / "run", 1, bytes_tokenizer())
    initial = GPT.forward
    monkeypatch.setattr(GPT, "forward", lambda self, *args, **kwargs: initial(self, *args, **kwargs) * math.nan)
    assert "NaN or infinity" in bad(capsys, f"--run={tmp_path / 'run'}", "--score=README.md")


def test_quantized_weights_are_scored(runs, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("abc" * 50)
    flags = f"--run={runs / 'bytes'}", f"--score={tmp_path / 'a.txt'}", "--output=csv"
    [exact], [rounded] = rows_of(start(capsys, *flags)), rows_of(start(capsys, *flags, "--quantize=int8"))
    assert float(rounded["bits_per_byte"]) == pytest.approx(float(exact["bits_per_byte"]), rel=0.01)
    assert rounded != exact
