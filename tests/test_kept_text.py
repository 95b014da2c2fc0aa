"""--keep_share: the text of the initial weights is mixed in, is measured, and a resumed run repeats the bits."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoint import list_checkpoints, open_checkpoint
from tests.test_train import TINY, message_of, read_events, reproducible, tensors_of, train, train_until_cut
from tests.test_training_data import CountingSplit
from training.data import JoinedSplits, MixedWindows, TrainBatches, TrainWindows, read_windows
from training.kept_text import KEEP_SHARE
from training.report import main as report


class Masked(CountingSplit):
    def mask(self, start, count):
        return np.arange(start, start + count) % 3 > 0


# ---- the order of two texts


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 0.9])
def test_samples_of_two_texts_are_spread_evenly_and_each_text_has_its_own_order(share):
    old, new = Shifted(400, 10_000), CountingSplit(300)
    mixed = MixedWindows(new, old, share, 8, seed=5)
    x, _ = mixed.read(0, 200)
    first = x[:, 0].numpy()
    is_old = first >= 10_000
    assert np.abs(np.cumsum(is_old) - share * np.arange(1, 201)).max() < 1
    assert np.array_equal(first[~is_old], TrainWindows(300, 8, 5).starts(0, 200)[: (~is_old).sum()])
    assert np.array_equal(first[is_old] - 10_000, TrainWindows(400, 8, 5).starts(0, 200)[: is_old.sum()])
    assert mixed.epochs(200) == pytest.approx([(~is_old).sum() / 36, is_old.sum() / 49])


class Shifted(CountingSplit):
    """The ids are those of another range, so that a row shows which text it is from."""

    def __init__(self, n_tokens, by):
        super().__init__(n_tokens)
        self.by = by

    def read(self, start, count):
        return super().read(start, count) + self.by


def test_the_mix_does_not_depend_on_the_micro_batch_and_no_share_is_the_text_alone():
    texts = CountingSplit(300), Shifted(400, 10_000)

    def rows(size, share):
        other = texts[1] if share else None
        batches = TrainBatches(texts[0], 8, 6, size, 3, torch.device("cpu"), False, other, share)
        return torch.cat([batch.x for step in range(4) for batch in batches(step)])

    for share in (0.0, 0.3):
        assert all(torch.equal(rows(6, share), rows(size, share)) for size in (1, 2, 3))
    x, y = MixedWindows(texts[0], None, 0.0, 8, 3).read(17, 5)
    expected = read_windows(texts[0], TrainWindows(300, 8, 3).starts(17, 5), 8)
    assert torch.equal(x, expected[0])
    assert torch.equal(y, expected[1])


def test_joined_splits_read_as_one():
    parts = [CountingSplit(7), Masked(5), Shifted(11, 100)]
    whole = np.concatenate([part.read(0, len(part)) for part in parts])
    masks = [np.ones(7, bool), parts[1].mask(0, 5), np.ones(11, bool)]
    joined = JoinedSplits(parts)
    assert len(joined) == 23
    for start, end in itertools.combinations(range(24), 2):
        assert np.array_equal(joined.read(start, end - start), whole[start:end])
        mask = joined.mask(start, end - start)
        expected = np.concatenate(masks)[start:end]
        assert np.array_equal(expected, np.ones(end - start, bool) if mask is None else mask)


# ---- whole runs

MORE = ("--eval_tokens=1000", "--sample_tokens=10", "--final_samples=1", "--threads=1", "--dtype=float32")
MORE = (*MORE, "--compile=false", "--tokens_per_step=256", "--micro_batch_size=4", "--budget_minutes=none")
MORE = (*MORE, "--max_steps=20", "--eval_interval=10", "--log_interval=4", "--learning_rate=1e-2", "--warmup_steps=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_text) -> Path:
    """A folder with a run on `first.txt`, a second text and a third one."""
    folder, before = tmp_path_factory.mktemp("first"), Path.cwd()
    os.chdir(folder)
    try:
        text = small_text.read_text("utf-8")
        Path("first.txt").write_text(text)
        Path("second.txt").write_text(text.upper()[:20_000])
        Path("third.txt").write_text(text[::-1][:20_000])
        assert train(*TINY, "--data=first.txt", "--run=first", "--max_steps=60") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def _in_a_copy(finished, tmp_path, monkeypatch):
    """The datasets are used where they are."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("data"))
    monkeypatch.chdir(tmp_path)


def start(data: str, run: str, *flags: str, source: str = "first") -> int:
    return train(*command(data, run, *flags, source=source))


def command(data: str, run: str, *flags: str, source: str = "first") -> list[str]:
    return [*MORE, f"--init_from={source}", f"--data={data}", f"--run={run}", *flags]


def kept_losses(run: str) -> list[tuple[float, float]]:
    """(before, after) of each old text at the end."""
    return [(event["before"], event["val_loss"]) for event in read_events(run, "kept") if event["step"]]


def test_the_old_text_is_mixed_in_and_what_became_of_it_is_said(capsys):
    assert start("second.txt", "more") == 0
    output = capsys.readouterr().out
    assert re.search(r"old text: 25% of the windows come from first-\w+ \([\d,]+ tokens\)", output)
    (before, after), *others = kept_losses("more")
    assert not others
    assert re.search(rf"old text first-\w+: val loss {before:.4f} → {after:.4f} \([+-]\d\.\d{{4}} ± ", output)
    assert re.search(r"read \d\.\d\d times: the new text; 0\.\d\d times: the old text", output)
    saved = json.loads(Path("more/config.json").read_text())
    assert saved["options"]["keep_share"] == KEEP_SHARE
    assert "keep_share" in saved["auto"]
    (kept,) = open_checkpoint(list_checkpoints(Path("more"))[-1]).state["kept"]
    assert kept["name"].startswith("first-")


def test_less_is_forgotten_with_a_larger_share():
    found = []
    for share in (0.05, 0.5):
        assert start("second.txt", f"share{share}", f"--keep_share={share}", "--max_steps=60") == 0
        found.append(kept_losses(f"share{share}")[0])
    assert found[0][0] == found[1][0]
    assert found[1][1] < found[0][1] - 0.1


@pytest.mark.parametrize("moment", [3, 13, 20])
@pytest.mark.parametrize("how", ["killed", "SIGTERM"])
def test_a_run_that_is_cut_ends_in_the_same_bits(monkeypatch, how, moment):
    flags = ("--save_interval=4", "--keep_share=0.3", "--dropout=0.1")
    assert start("second.txt", "whole", *flags) == 0
    train_until_cut(monkeypatch, how, moment, command("second.txt", "cut", *flags))
    assert train("--resume=cut") == 0
    assert tensors_of("cut", 20) == tensors_of("whole", 20)
    assert reproducible("cut") == reproducible("whole")


def test_a_chain_keeps_all_of_its_texts(capsys):
    assert start("second.txt", "two") == 0
    assert start("third.txt", "three", "--keep_share=0.4", source="two") == 0
    state = open_checkpoint(list_checkpoints(Path("three"))[-1]).state
    assert [re.sub(r"-\w+$", "", text["name"]) for text in state["kept"]] == ["second", "first"]
    assert len(kept_losses("three")) == 2
    assert train("--resume=three", "--max_steps=24") == 0
    assert len(kept_losses("three")) == 4
    assert report(["three"]) == 0
    assert "Old text</th><td>val loss" in Path("three/report.html").read_text()
    capsys.readouterr()
    assert start("third.txt", "alone", "--keep_share=0", source="two") == 0
    assert "old text" not in capsys.readouterr().out
    assert open_checkpoint(list_checkpoints(Path("alone"))[-1]).state["kept"] == []


def test_its_config_repeats_it_and_looks_for_the_text_again(capsys):
    assert start("second.txt", "more") == 0
    assert train("more/config.json", "--run=again", "--threads=1", "--micro_batch_size=4", "--compile=false") == 0
    assert tensors_of("again", 20) == tensors_of("more", 20)


# ---- old text that is not there


def make_a_run_of_a_text_that_goes(how: str) -> Path:
    """A run `lost`, whose dataset is then deleted or changed; the dataset's folder."""
    Path("lost.txt").write_text(Path("first.txt").read_text()[:30_000])
    assert train(*MORE, "debug", "--data=lost.txt", "--data_dir=elsewhere", "--run=lost", *MORE, "--max_steps=2") == 0
    (folder,) = Path("elsewhere").glob("lost-*")
    shutil.rmtree(folder)
    if how == "changed":
        Path("lost.txt").write_text(Path("second.txt").read_text())
        assert train(*MORE, "debug", "--data=lost.txt", "--data_dir=elsewhere", *MORE, "--max_steps=1") == 0
        next(Path("elsewhere").glob("lost-*")).rename(folder)
    return folder


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_old_text_that_is_not_there_is_noted_and_refused_where_it_was_asked_for(how, capsys):
    folder = make_a_run_of_a_text_that_goes(how)
    words = "is gone" if how == "gone" else "holds other tokens than the weights were trained on"
    message = message_of(*MORE, "--init_from=lost", "--data=third.txt", "--keep_share=0.2")
    assert message.startswith("--keep_share=0.2: ")
    assert str(folder.resolve()) in message or str(folder) in message
    assert words in message
    capsys.readouterr()
    assert start("third.txt", "without", source="lost") == 0
    output = capsys.readouterr().out
    assert output.count("may be forgotten") == 1
    assert words in output
    assert json.loads(Path("without/config.json").read_text())["options"]["keep_share"] == 0
    assert start("third.txt", "quiet", "--keep_share=0", source="lost") == 0
    assert "forgotten" not in capsys.readouterr().out


def test_a_moved_dataset_is_found_by_name(capsys):
    folder = make_a_run_of_a_text_that_goes("gone")
    Path("lost.txt").write_text(Path("first.txt").read_text()[:30_000])
    assert train(*MORE, "debug", "--data=lost.txt", "--data_dir=there", *MORE, "--max_steps=1") == 0
    assert (Path("there") / folder.name).is_dir()
    assert start("third.txt", "found", "--data_dir=there", source="lost") == 0
    assert f"come from {folder.name} (" in capsys.readouterr().out


def test_a_resumed_run_needs_its_old_text(capsys):
    Path("lost.txt").write_text(Path("first.txt").read_text()[:30_000])
    assert train(*MORE, "debug", "--data=lost.txt", "--data_dir=elsewhere", "--run=lost", *MORE, "--max_steps=2") == 0
    assert start("third.txt", "more", source="lost") == 0
    log = Path("more/metrics.jsonl").read_bytes()
    shutil.rmtree("elsewhere")
    message = message_of("--resume=more", "--max_steps=30")
    assert "is gone: resuming needs the same text" in message
    assert Path("more/metrics.jsonl").read_bytes() == log
    assert train("--resume=more", "--eval_only=true") == 0


def test_weights_without_a_record_and_the_very_text_again(capsys):
    shutil.copytree("first/checkpoints/step-00000060/model", "exported")
    assert "does not record the text" in message_of(
        *MORE, "--init_from=exported", "--data=second.txt", "--keep_share=0.1"
    )
    assert start("second.txt", "from_exported", source="exported") == 0
    assert "exported does not record the text of its weights" in capsys.readouterr().out
    assert "this very text" in message_of(*MORE, "--init_from=first", "--data=first.txt", "--keep_share=0.1")
    assert start("first.txt", "same") == 0
    assert "forgotten" not in capsys.readouterr().out


def test_where_the_share_means_nothing():
    assert "--init_from=RUN" in message_of(*TINY, "--data=first.txt", "--keep_share=0.1")
    assert "keep_share" in message_of("--resume=first", "--keep_share=0.1")


# ---- the tokenizer and the new text


def test_how_well_the_tokenizer_suits_the_new_text_is_said(capsys):
    flags = ("--tokenizer=bpe", "--vocab_size=300")
    assert train(*TINY, "--data=first.txt", "--run=bpe", *flags, "--max_steps=2") == 0
    assert start("third.txt", "reversed", source="bpe") == 0
    output = capsys.readouterr().out
    new, old = re.search(
        r"tokenizer: (\S+) bytes a token in the new text, (\S+) in the old one: it suits", output
    ).groups()
    assert float(new) < 0.75 * float(old)
    Path("more.txt").write_text(Path("first.txt").read_text()[:20_000].replace("Anna", "Emma"))
    assert start("more.txt", "similar", source="bpe") == 0
    assert "suits the new text poorly" not in capsys.readouterr().out


def test_characters_that_a_model_does_not_know_are_counted():
    assert train(*TINY, "--data=first.txt", "--run=char", "--tokenizer=char", "--max_steps=2") == 0
    Path("new.txt").write_text(Path("first.txt").read_text()[:10_000].replace("a", "ä", 50).replace("w", "ω", 3))
    message = message_of(*MORE, "--init_from=char", "--data=new.txt")
    assert "characters, and 53 of the text's 10,000 (0.53%) are others: 'ä' (50), 'ω' (3). " in message
