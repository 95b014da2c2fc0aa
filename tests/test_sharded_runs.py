"""A run whose checkpoint several ranks have written: everything reads it on one machine, as it reads any other."""

import os
import shutil
from pathlib import Path

import pytest
import torch

import interop.__main__ as interop
import sample as sample_script
from checkpoint import Checkpoint, list_checkpoints, open_checkpoint, open_latest
from errors import UserError
from model_folder import open_model_folder
from sharded_checkpoint import save_sharded_checkpoint
from tests.test_sharded_checkpoint import on_ranks, same, split
from tests.test_train import TINY, message_of, read_events, tensors_of, train
from training import report

ADAPT = (*TINY, "--data=new.txt", "--compile=false", "--seed=3")


def reshard(run: Path, size: int = 3) -> Path:
    """Saves the last checkpoint of a run again, by several ranks."""
    opened = open_checkpoint(list_checkpoints(run)[-1])
    model, moments = opened.model.own_tensors(), opened.optimizer_tensors()
    saved = on_ranks(
        size,
        lambda member: save_sharded_checkpoint(
            run, opened.step, member, model=split(model, member.rank, size), config=opened.config,
            tokenizer=opened.tokenizer, optimizer=split(moments, member.rank, size), state=opened.state,
            adapter=opened.model.adapter,
        ),
    )  # fmt: skip
    assert saved == [opened.path] * size
    assert not (opened.path / "model/model.safetensors").exists()
    return opened.path


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_text) -> Path:
    """A folder with a run, whole and sharded; one that adapts it, whole and sharded."""
    folder, before = tmp_path_factory.mktemp("sharded runs"), Path.cwd()
    os.chdir(folder)
    try:
        shutil.copy(small_text, "old.txt")
        lines = small_text.read_text("utf-8").splitlines()[:1500]
        Path("new.txt").write_text("".join(f"{line[:-1]}, {line[:4]}?\n" for line in lines), encoding="utf-8")
        assert train(*TINY, "--data=old.txt", "--run=whole") == 0
        shutil.copytree("whole", "sharded")
        reshard(Path("sharded"))
        assert train(*ADAPT, "--init_from=whole", "--lora_rank=2", "--run=adapters") == 0
        shutil.copytree("adapters", "sharded adapters")
        reshard(Path("sharded adapters"))
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def _in_a_copy(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def last(run: str) -> Checkpoint:
    return open_latest(Path(run))


@pytest.mark.parametrize("run", ["whole", "adapters"])
def test_everything_reads_a_sharded_run(run, capsys):
    other = "sharded" if run == "whole" else "sharded adapters"
    assert same(last(run).model_tensors(), last(other).model_tensors())
    assert same(last(run).frozen_tensors(), last(other).frozen_tensors())
    shown = []
    for name in (run, other):
        capsys.readouterr()
        assert sample_script.main([f"--run={name}", "--checkpoint=latest", "--prompt=And", "--max_new_tokens=20"]) == 0
        shown.append(capsys.readouterr().out.replace(name, "RUN"))
    assert shown[0] == shown[1]
    facts = [report.read_facts(Path(name), report.read_metrics(Path(name))) for name in (run, other)]
    assert facts[0]["n_params"] == facts[1]["n_params"]


@pytest.mark.parametrize("option", ["--init_from", "--teacher"])
def test_a_run_starts_from_a_sharded_one_as_from_a_whole_one(option):
    for name in ("whole", "sharded"):
        assert train(*ADAPT, f"{option}={name}/checkpoints/step-00000020", f"--run=from {name}") == 0
    assert tensors_of("from whole", 20) == tensors_of("from sharded", 20)
    if option == "--teacher":
        assert last("from whole").state["teachers"] == last("from sharded").state["teachers"]


def test_adapters_of_a_sharded_model_have_a_whole_base():
    path = "checkpoints/step-00000020"
    for name in ("whole", "sharded"):
        assert train(*ADAPT, f"--init_from={name}/{path}", "--lora_rank=2", f"--run=new {name}") == 0
    base = "base/model.safetensors"
    assert (Path("new whole") / base).read_bytes() == (Path("new sharded") / base).read_bytes()
    assert tensors_of("new whole", 20) == tensors_of("new sharded", 20)


@pytest.mark.parametrize("run", ["whole", "adapters"])
def test_a_sharded_run_is_resumed_to_the_same_bits(run):
    other = "sharded" if run == "whole" else "sharded adapters"
    for name in (run, other):
        assert train(f"--resume={name}", "--max_steps=30") == 0
    assert tensors_of(run, 30) == tensors_of(other, 30)
    assert read_events(run, "step") == read_events(other, "step")


@pytest.mark.parametrize("run", ["whole", "sharded", "adapters", "sharded adapters"])
def test_a_model_folder_is_made_of_any_run(run, capsys):
    assert interop.main(["export", run, "--to=model", "--out=a folder/model", "--checkpoint=latest"]) == 0
    assert "read back bit by bit" in capsys.readouterr().out
    assert sorted(path.name for path in Path("a folder/model").iterdir()) == [
        "config.json", "model.safetensors", "sprout_tokenizer.json",
    ]  # fmt: skip
    folder, opened = open_model_folder(Path("a folder/model")), last(run)
    assert same(folder.model_tensors(), opened.model_tensors())
    assert (folder.config, folder.tokenizer, folder.adapter) == (opened.config, opened.tokenizer, None)
    assert folder.reader().rows("embed.weight", 3, 5).equal(opened.model_tensors()["embed.weight"][3:5])
    if "adapters" not in run:
        assert folder.weights_entry() == opened.model.weights_entry()
    assert sample_script.main(["--run=a folder/model", "--prompt=And", "--max_new_tokens=5"]) == 0
    for arguments, message in (
        (["--out=a folder/model"], "a folder/model exists; remove it"),
        (["--dtype=float16"], "keeps the weights as they are stored; leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            interop.main(["export", run, "--to=model", *arguments])
    assert not Path("exports").exists()


def test_an_export_that_differs_from_the_run_is_removed(monkeypatch):
    import interop.exporting as exporting

    real = exporting.write_model_folder

    def write(path, tensors, *rest):
        real(path, {name: torch.nextafter(t, t + 1) for name, t in tensors.items()}, *rest)

    monkeypatch.setattr(exporting, "write_model_folder", write)
    with pytest.raises(UserError, match="is not what was written"):
        interop.main(["export", "sharded", "--to=model", "--out=out"])
    assert not Path("out").exists()


def test_a_copied_model_without_its_shards_names_the_export():
    shutil.copytree("sharded/checkpoints/step-00000020/model", "copy")
    command = "interop export RUN --to=model"
    assert command in message_of(*ADAPT, "--init_from=copy")
    with pytest.raises(UserError, match=command):
        sample_script.main(["--run=copy", "--prompt=And"])
