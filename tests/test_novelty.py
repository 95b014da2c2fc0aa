"""sample.py --novelty: marks, lists and fields; which dataset is compared with; errors that name the next command."""

import json
import re
import shlex
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

import sample
from checkpoint import save_checkpoint
from common.signature import signed
from common.tokenizer import bytes_tokenizer, char_tokenizer
from common.weights import export_weights
from errors import UserError
from generation import novelty as output
from generation.options import SamplingOptions
from generation.text import Piece, load_model
from model import GPT, GPTConfig
from prepare_data import PrepareOptions, origin
from prepare_data.novelty import Novelty
from prepare_data.passage_index import INDEX
from prepare_data.pipeline import make_corpus, prepare
from prepare_data.shards import open_dataset
from server import completions
from server.completions import ServedModel
from terminal import print_marked
from tests.test_server import ask, running
from training.report import main as report_main

SENTENCE = "Anna sees a cat 3 times today. "


@pytest.fixture
def home(tmp_path, monkeypatch, small_text):
    """A folder with data/notes, made of small_text, and runs/notes, a model of random weights trained on it."""
    monkeypatch.chdir(tmp_path)
    dataset = prepare(make_corpus("text", str(small_text), PrepareOptions()), PrepareOptions(vocab_size=300), "notes")
    tokenizer = dataset.tokenizer
    config = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16)
    config = replace(config, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    facts = {"name": dataset.name, "path": str(dataset.folder.resolve()), "fingerprint": dataset.fingerprint}
    content = {"model": export_weights(GPT(config)), "config": config.to_dict(), "tokenizer": tokenizer.to_dict()}
    save_checkpoint(tmp_path / "runs" / "notes", 5, **content, optimizer={}, state=signed({"dataset": facts}))
    return tmp_path


def start(capsys, *flags):
    """The output of sample.py on the run's model."""
    capsys.readouterr()
    assert sample.main(["--run=runs/notes", "--max_new_tokens=20", "--novelty", "--threads=1", *flags]) == 0
    return capsys.readouterr()


def says(monkeypatch, *texts):
    """Makes the model write these samples."""
    pieces = [Piece(i, part, (), None) for i, text in enumerate(texts) for part in re.findall(r"..?", text, re.DOTALL)]
    pieces += [Piece(i, "", (), "length") for i in range(len(texts))]
    monkeypatch.setattr(sample, "stream_texts", lambda *_, **__: iter(pieces))


COPIED = "Ben takes two trees 5.\nCleo"  # stands in small_text, 6 words


def test_a_pipe_gets_the_samples_alone(home, capsys, monkeypatch, small_text):
    says(monkeypatch, f" xx {COPIED} yy", "nothing of that")
    out, err = start(capsys, "--num_samples=2", "--prompt=Anna")
    assert out == f"Anna xx {COPIED} yy\n---\nAnnanothing of that\n"
    share = len(COPIED) / len(f" xx {COPIED} yy")
    assert f"sample 1: {share:.1%} of {len(COPIED) + 7} characters copied\n  6 words: " in err
    assert '"Ben takes two trees 5.⏎Cleo"' in err
    assert "sample 2: 0.0% of 15 characters copied\n" in err
    overall = len(COPIED) / (len(COPIED) + 7 + 15)
    assert f"in passages of 6 words or more: {overall:.1%}; of the val split " in err
    assert re.search(r"the longest passage has 6 words .*sätze 1\.txt, line [\d,]+:\n  ….*\[\[Ben takes", err)
    [line] = re.findall(r"sätze 1\.txt, line ([\d,]+):", err)
    lines = small_text.read_text("utf-8").split("\n")
    assert lines[int(line.replace(",", "")) - 1] == COPIED.split("\n")[0]


def test_a_dataset_from_elsewhere_names_no_file(home, capsys, monkeypatch):
    """It may claim to be prepared from any folder, which would be walked."""
    path = home / "data" / "notes" / "dataset.json"
    meta = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(meta | {"source": {"name": "x", "origin": str(home)}}), encoding="utf-8")
    monkeypatch.setattr(origin, "list_files", lambda *_: pytest.fail("a folder was walked"))
    says(monkeypatch, COPIED)
    assert re.search("document 1 of the train split, line [0-9,]+\n", start(capsys).err)


def test_shorter_passages_count_where_that_is_asked_for(home, capsys, monkeypatch):
    says(monkeypatch, "zz two trees zz")
    assert "0.0% of 15 characters copied" in start(capsys).err
    assert f"{9 / 15:.1%} of 15 characters copied" in start(capsys, "--novelty_words=2").err


def test_the_prompt_is_not_counted(home, capsys, monkeypatch):
    says(monkeypatch, " takes zz")
    err = start(capsys, "--prompt=Anna sees the moon 4.\nBen", "--novelty_words=1").err
    assert f"{5 / 9:.1%} of 9 characters copied" in err


def test_json_lines_have_the_share_and_the_passages(home, capsys, monkeypatch):
    says(monkeypatch, f"xx {COPIED} yy", "none")
    lines = [json.loads(line) for line in start(capsys, "--num_samples=2", "--output=jsonl").out.splitlines()]
    assert [line["copied"] for line in lines] == [round(len(COPIED) / (len(COPIED) + 6), 4), 0]
    [passage] = lines[0]["passages"]
    assert lines[0]["text"][passage["start"] : passage["end"]] == COPIED
    assert passage["words"] == 6
    assert "sätze 1.txt, line" in passage["source"]
    assert lines[1]["passages"] == []


def test_a_terminal_shows_them_underlined(home, capsys, monkeypatch):
    says(monkeypatch, f"xx {COPIED} yy\x1b[31m")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = start(capsys, "--prompt=Anna").out
    first, second = COPIED.split("\n")
    assert out == f"Annaxx \x1b[4;36m{first}\x1b[0m\n\x1b[4;36m{second}\x1b[0m yy␛[31m\n"


@pytest.mark.parametrize(("variable", "mark"), [("TERM", "[[b]]"), ("NO_COLOR", "\x1b[4mb\x1b[0m")])
def test_marks_without_colors(capsys, monkeypatch, variable, mark):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, "dumb")
    print_marked("abcd", [(1, 2), (1, 2)])
    assert capsys.readouterr().out == f"a{mark}cd"


def test_the_listed_passages_are_the_longest(home, capsys, monkeypatch):
    says(monkeypatch, " zz ".join(["two trees"] * 7 + [COPIED]))
    err = start(capsys, "--novelty_words=2").err
    assert err.count("\n  2 words:") == output.MAX_LISTED - 1
    assert "\n  6 words:" in err
    assert "\n  and 3 shorter passages" in err


def test_an_interactive_answer_is_followed_by_what_it_has_copied(home, capsys, monkeypatch):
    lines = iter(["Anna sees the moon 4."])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, None) or (_ for _ in ()).throw(EOFError))
    pieces = [Piece(0, f"\n{COPIED} zz", (), None), Piece(0, "", (), "length")]
    monkeypatch.setattr("generation.interactive.stream_texts", lambda *_, **__: iter(pieces))
    err = start(capsys, "--interactive").err
    assert f"{len(COPIED) / (len(COPIED) + 4):.1%} of {len(COPIED) + 4} characters copied\n  6 words: " in err


# ---- the server and the report


def test_the_server_answers_with_what_a_sample_has_copied(home, monkeypatch):
    model, tokenizer = load_model(home / "runs/notes/checkpoints/step-00000005/model", torch.device("cpu"))
    novelty = Novelty(open_dataset("data/notes"), 6)
    served = ServedModel("notes", model, tokenizer, SamplingOptions(), 0, novelty)
    pieces = [Piece(i, f" zz {COPIED}"[: 40 * i], (), None) for i in (0, 1)] + [
        Piece(i, "", (), "length") for i in (0, 1)
    ]
    monkeypatch.setattr(completions, "stream_texts", lambda *_, **__: iter(pieces))
    with running(served) as (url, _):
        status, _, content = ask(url, "POST", body={"prompt": "Anna", "n": 2, "max_tokens": 5, "novelty": True})
        assert status == 200
        none, some = content["choices"]
        assert (none["copied"], none["passages"]) == (0, [])
        assert some["copied"] == round(len(COPIED) / (len(COPIED) + 4), 4)
        assert some["held_out"] == round(novelty.yardstick(40).share, 4)
        [passage] = some["passages"]
        assert some["text"][passage["start"] : passage["end"]] == COPIED
        assert "line" in passage["source"]
        _, _, without = ask(url, "POST", body={"prompt": "Anna", "n": 2, "max_tokens": 5})
        assert "copied" not in without["choices"][0]
        _, _, models = ask(url, path="/v1/models")
        assert models["data"][0]["novelty"] == {}
    for missing, problem in (("no dataset here", "no dataset here"), (None, "start sample.py --serve with --novelty")):
        with running(replace(served, novelty=missing)) as (url, _):
            status, _, content = ask(url, "POST", body={"prompt": "Anna", "novelty": True})
            assert status == 400
            assert problem in content["error"]["message"]
            _, _, models = ask(url, path="/v1/models")
            assert models["data"][0]["novelty"] == (missing and {"problem": missing})


def test_a_page_is_served_without_the_dataset_and_says_so(home, capsys, monkeypatch):
    shutil.move(home / "data/notes", home / "moved")
    given = []
    monkeypatch.setattr("server.app.serve", lambda *args: given.append(args[-1]) or 0)
    err = start(capsys, "--serve").err
    assert "note: --novelty: the dataset that this model was trained on" in err
    assert "is gone" in given[0]
    start(capsys, "--serve", "--data=moved")
    assert isinstance(given[1], Novelty)
    with pytest.raises(UserError, match="--data=nowhere"):
        sample.main(["--run=runs/notes", "--serve", "--novelty", "--data=nowhere"])


def report_of(home, text):
    (home / "runs/notes/metrics.jsonl").write_text('{"event": "step", "step": 5, "loss": 1.0}\n')
    (home / "runs/notes/samples.txt").write_text(f"==== step 5 (sample) ====\n{text}\n\n", encoding="utf-8")
    assert report_main(["runs/notes"]) == 0
    return (home / "runs/notes/report.html").read_text("utf-8")


def test_the_report_marks_what_the_last_samples_have_copied(home):
    page = report_of(home, f"<b>zz {COPIED} & zz")
    first, second = COPIED.split("\n")
    assert re.search(
        rf'&lt;b&gt;zz <mark title="6 words, [^"]*sätze 1\.txt, line [\d,]+">{first}\n{second}</mark> &amp; zz</pre>',
        page,
    )
    share = len(COPIED) / len(f"<b>zz {COPIED} & zz")
    assert f"in passages of 6 words or more: {share:.1%} of the samples, " in page


def test_the_report_leaves_out_the_prompt(home):
    (home / "runs/notes/config.json").write_text(json.dumps({"options": {"sample_prompt": COPIED}}))
    assert "<mark" not in report_of(home, f"{COPIED} zz zz")


def test_the_report_says_why_it_does_not_know(home, monkeypatch):
    monkeypatch.setattr("training.copied.MAX_INDEXED", 10)
    assert "first run python sample.py --run=runs/notes --novelty" in report_of(home, COPIED)
    shutil.move(home / "data/notes", home / "moved")
    page = report_of(home, COPIED)
    assert "What they have copied is not known: the dataset" in page
    assert f"<pre dir=auto>{COPIED}</pre>" in page


# ---- which dataset


def bad(capsys, *flags):
    capsys.readouterr()
    with pytest.raises(UserError) as error:
        sample.main(["--run=runs/notes", "--novelty", "--threads=1", "--max_new_tokens=5", *flags])
    assert capsys.readouterr().out == "", "the error comes before any text"
    return str(error.value)


def flag_of(message):
    return next(word for word in shlex.split(message) if word.startswith("--data=")).rstrip(",.;)")


def test_a_dataset_that_was_moved_with_the_project_is_found(home, capsys, monkeypatch):
    shutil.move(home / "data", home / "elsewhere")
    monkeypatch.chdir(home / "elsewhere")
    shutil.move(home / "elsewhere/notes", home / "elsewhere/data/notes")
    shutil.move(home / "runs", home / "elsewhere/runs")
    assert "copied" in start(capsys).err


def test_a_dataset_that_is_gone(home, capsys):
    shutil.move(home / "data/notes", home / "moved")
    message = bad(capsys)
    assert re.search(r"--novelty: the dataset .*notes, is gone: .*--data=PATH", message)
    assert "copied" in start(capsys, "--data=moved").err


def test_a_dataset_that_has_changed(home, capsys, small_text):
    shutil.rmtree(home / "data/notes")
    (home / "other.txt").write_text(small_text.read_text("utf-8")[:20_000], encoding="utf-8")
    prepare(make_corpus("text", "other.txt", PrepareOptions()), PrepareOptions(tokenizer="char"), "notes")
    message = bad(capsys)
    assert "no longer the text that this model was trained on" in message
    err = start(capsys, flag_of(message)).err
    assert "is not the dataset that this model was trained on" in err
    assert "copied" in err


def test_a_model_folder_alone_needs_to_be_told(home, capsys, small_text):
    model = home / "exported"
    shutil.move(home / "runs/notes/checkpoints/step-00000005/model", model)
    assert "--data=PATH" in bad(capsys, f"--run={model}")
    assert "copied" in start(capsys, f"--run={model}", "--data=notes").err
    out, err = start(capsys, f"--run={model}", f"--data={small_text}")  # the text itself is prepared
    assert "prepared data" in err
    assert "prepared" not in out


def test_the_file_of_a_folder_is_named(home, capsys, monkeypatch):
    texts = {
        "one.txt": "\ufeffEine Katze sitzt hier.\nUnd dann geht die Katze weg.\n",
        "sub/two é.txt": "Der Hund bellt.\n",
    }
    for name, text in texts.items():
        (home / "animals" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "animals" / name).write_text(text * 9, encoding="utf-8")
    prepare(make_corpus("text", "animals", PrepareOptions()), PrepareOptions(tokenizer="bytes"), "animals")
    says(monkeypatch, "zz dann geht die Katze weg. zz")
    err = start(capsys, "--data=data/animals", "--novelty_words=5").err
    assert re.search(r'5 words: "dann geht die Katze weg.", animals.one\.txt, line \d+\n', err)
    shutil.rmtree(home / "animals")
    assert "document 1 of 1 of the train split, line" in start(capsys, "--data=data/animals", "--novelty_words=5").err


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_shards_of_other_programs(home, capsys, monkeypatch, small_text, dtype):
    ids = np.frombuffer(small_text.read_bytes(), np.uint8).astype(dtype)
    (home / "foreign").mkdir()
    ids.tofile(home / "foreign/train.bin")
    ids[:5000].tofile(home / "foreign/val.bin")
    (home / "sprout_tokenizer.json").write_text(json.dumps(bytes_tokenizer().to_dict()), encoding="utf-8")
    monkeypatch.setattr(output, "TOKENIZER", str(home / "sprout_tokenizer.json"))
    says(monkeypatch, f"zz {COPIED} zz")
    err = start(capsys, "--data=foreign").err
    assert "6 words: " in err
    assert "document 1 of the train split, line" in err
    assert re.search(r"of the val split (9\d\.\d|100\.0)%", err)


def test_a_run_that_began_with_other_weights_says_what_is_not_searched(home, capsys):
    state = home / "runs/notes/checkpoints/step-00000005/state.json"
    content = json.loads(state.read_text("utf-8")) | {"options": {"init_from": "runs/old"}}
    folder = home / "copy/model"
    shutil.copytree(state.parent, folder.parent)
    (folder.parent / "state.json").write_text(json.dumps(content), encoding="utf-8")
    assert "the text of runs/old, where the weights began, is not searched" in start(capsys, f"--run={folder}").err


def test_a_text_that_does_not_exist(home, capsys):
    assert re.search("--data=nowhere: no dataset, file or folder", bad(capsys, "--data=nowhere"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data=notes", "--novelty=false"], "--data=notes has no effect with novelty=false: add --novelty=true"),
        (["--novelty_words=3", "--novelty=false"], "--novelty_words=3 has no effect with novelty=false"),
        (["--inspect=out.html"], "remove --prompts, --interactive, --num_samples, --output and --novelty"),
        (["--novelty_words=0"], "whole number with 1 <= x <= 1000"),
    ],
)
def test_flags_that_contradict_each_other(home, capsys, flags, message):
    assert message in bad(capsys, *flags)


def test_the_yardstick_is_cut_into_pieces_as_long_as_the_samples(home):
    novelty = Novelty(open_dataset("data/notes"), 3)
    short, long = novelty.yardstick(200), novelty.yardstick(1000)
    assert short.pieces > long.pieces > 1
    assert 0.7 * 200 < short.characters / short.pieces < 1.3 * 200
    assert 0.7 * 1000 < long.characters / long.pieces < 1.3 * 1000
    assert long.share > 0.5  # sentences of the same few words
    assert novelty.yardstick(10**9).pieces == 1
    assert (home / "data/notes" / INDEX).is_file()


def test_characters_that_the_tokenizer_lacks_do_not_matter(home):
    """Text is compared, not ids."""
    novelty = Novelty(open_dataset("data/notes"), 3)
    [copied] = novelty.check([("", "世 Anna sees a cat 世\ufffd")])
    assert [found.text for found in copied.passages] == ["Anna sees a cat"]
    assert char_tokenizer("a").vocab_size == 2
