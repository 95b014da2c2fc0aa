"""--teacher: the loss is the one it says; a run takes the teacher's tokenizer, and resumes to the same bits."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint import list_checkpoints, open_checkpoint, resolve_model_folder
from common.hardware import choose_hardware
from common.options import HardwareOptions
from model import GPT, IGNORED_TARGET, GPTConfig
from model_folder import open_model_folder
from tests.test_train import TINY, message_of, read_events, reproducible, tensors_of, train, train_until_cut
from training.options import OptimizerOptions
from training.plan import Shape
from training.step_cost import StepCost
from training.teachers import taught

MORE = (*TINY, "--tokenizer=bpe", "--vocab_size=300", "--data=text.txt", "--compile=false", "--seed=2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_text) -> Path:
    """A folder with runs of one text: two with the same 300 byte pairs, and one with bytes."""
    folder, before = tmp_path_factory.mktemp("finished"), Path.cwd()
    os.chdir(folder)
    try:
        shutil.copy(small_text, "text.txt")
        for run, flags in {
            "first": (),
            "longer": ("--max_steps=200", "--dropout=0"),
            "bytes": ("--tokenizer=bytes",),
        }.items():
            vocabulary = [flag for flag in MORE if run != "bytes" or not flag.startswith("--vocab_size")]
            assert train(*vocabulary, f"--run={run}", *flags) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def _in_a_copy(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def folder_of(run):
    return open_model_folder(resolve_model_folder(Path(run)))


def weights_of(run):
    return resolve_model_folder(Path(run)) / "model.safetensors"


# ---- the loss


@pytest.mark.parametrize("runs", [["first"], ["first", "longer"]])
@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_loss_is_cross_entropy_with_a_mixture_of_targets_and_probabilities(runs, share):
    folders = [folder_of(run) for run in runs]
    config = GPTConfig(**{**folders[0].config, "dropout": 0.0})
    student = GPT(config, seed=3)
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 300, (2, 16), generator=generator)
    y = torch.randint(0, 300, (2, 16), generator=generator)
    y[0, :5] = IGNORED_TARGET
    loss = taught(student, folders, share, student, choose_hardware(HardwareOptions(device="cpu", dtype="float32")))
    ours = loss(x, y, reduction="sum", label_smoothing=0.0).detach()

    probabilities = torch.stack([torch.softmax(model(x).double(), dim=-1) for model in map(loaded, folders)]).mean(
        dim=0
    )
    targets = torch.nn.functional.one_hot(y.clamp(min=0), config.vocab_size)
    mixture = (1 - share) * targets + share * probabilities
    each = -(mixture * torch.log_softmax(student(x).double(), dim=-1)).sum(dim=-1)
    assert float(ours) == pytest.approx(float(each[y != IGNORED_TARGET].sum().detach()), rel=1e-5)


def loaded(folder):
    model = GPT(GPTConfig(**{**folder.config, "dropout": 0.0}), seed=None)
    model.load_state_dict({name: padded(model, name, tensor) for name, tensor in folder.model_tensors().items()})
    return model.eval().requires_grad_(False)


def padded(model, name, tensor):
    full = torch.zeros_like(model.get_parameter(name))
    full[: len(tensor)] = tensor
    return full


def test_without_teachers_the_loss_is_the_model_itself():
    student = GPT(GPTConfig(**folder_of("first").config), seed=3)
    assert taught(student, [], 0.7, student, None) is student


def test_a_student_of_the_probabilities_alone_comes_near_its_teacher():
    """It never sees which id followed, and yet predicts the val split better than an untrained model by far."""
    flags = ("--teacher_share=1", "--max_steps=200", "--dropout=0", "--learning_rate=1e-2")
    assert train(*MORE, "--run=student", "--teacher=longer", *flags) == 0
    losses = [event["val_loss"] for event in read_events("student", "eval")]
    teacher = read_events("longer", "eval")[-1]["val_loss"]
    assert losses[0] - losses[-1] > 0.7 * (losses[0] - teacher)


# ---- whole runs


def test_a_run_takes_the_tokenizer_and_records_the_weights(capsys):
    plain = [flag for flag in MORE if not flag.startswith(("--tokenizer", "--vocab_size"))]
    assert train(*plain, "--run=student", "--teacher=first", "--teacher=longer") == 0
    student, teacher = folder_of("student"), folder_of("first")
    assert student.tokenizer == teacher.tokenizer
    options = json.loads(Path("student/config.json").read_text())["options"]
    assert options["vocab_size"] == 300
    assert [Path(path).parent.parent.parent.name for path in options["teacher"]] == ["first", "longer"]
    state = open_checkpoint(list_checkpoints(Path("student"))[-1]).state
    assert [entry["bytes"] for entry in state["teachers"]] == [
        weights_of(run).stat().st_size for run in ("first", "longer")
    ]
    without = train(*plain, "--run=alone", "--tokenizer=bpe", "--vocab_size=300")
    assert without == 0
    assert tensors_of("alone", 20) != tensors_of("student", 20)
    assert re.search(r"^teacher: first/\S+, longer/\S+; 70% of the targets", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("how", ["killed", "SIGTERM"])
def test_a_run_that_is_cut_ends_in_the_same_bits(monkeypatch, how):
    flags = (*MORE, "--teacher=longer", "--save_interval=4", "--dropout=0.1")
    assert train(*flags, "--run=whole") == 0
    train_until_cut(monkeypatch, how, 13, [*flags, "--run=cut"])
    monkeypatch.chdir("cut")  # its teacher is found from elsewhere, too
    assert train("--resume=.") == 0
    monkeypatch.chdir("..")
    assert tensors_of("cut", 20) == tensors_of("whole", 20)
    assert reproducible("cut") == reproducible("whole")


def test_a_plan_counts_the_time_of_the_teacher():
    """A forward pass, a third of what the student needs where it is as large."""
    config, hardware = GPTConfig(**folder_of("first").config), choose_hardware(HardwareOptions(device="cpu"))
    shape = Shape(config.n_layer, config.n_embd, config.n_head, config.block_size)
    costs = [
        StepCost(config, OptimizerOptions(), hardware, "sdpa", teachers=teachers, pass_seconds=(1e-9, 1e-9))
        for teachers in ([], [config], [config, config])
    ]
    seconds = [cost.step_seconds(shape, 256) for cost in costs]
    assert seconds[0] > 0
    assert seconds == pytest.approx([seconds[0], 4 / 3 * seconds[0], 5 / 3 * seconds[0]])


def test_a_plan_names_whose_tokenizer_it_takes(capsys):
    flags = ("--data=text.txt", "--budget_minutes=1", "--threads=1", "--plan")
    assert train(*flags, "--teacher=longer") == 0
    assert "bpe of 300 ids (that of the teacher)" in capsys.readouterr().out


# ---- teachers that do not fit


def test_models_of_other_tokenizers_are_refused():
    message = message_of(*MORE, "--run=student", "--teacher=first", "--teacher=bytes")
    assert re.search(r"bytes/checkpoints/\S+ has another tokenizer than first/", message)
    plain = [flag for flag in MORE if not flag.startswith(("--tokenizer", "--vocab_size"))]
    assert "another tokenizer" in message_of(*plain, "--run=student", "--init_from=bytes", "--teacher=first")
    message = message_of(*MORE, "--run=student", "--teacher=first", "--vocab_size=400")
    assert "--vocab_size=400: the weights of --teacher=first have their own tokenizer; leave the flag out" in message
    assert not Path("student").exists()


def test_a_shorter_context_is_refused():
    message = message_of(*MORE, "--run=student", "--teacher=first", "--block_size=64", "--tokens_per_step=256")
    assert "is shorter than --block_size=64 of this run; give --block_size=32" in message


def test_a_share_of_no_teacher_is_refused():
    assert "--teacher_share=0.5: there is no teacher" in message_of(*MORE, "--run=student", "--teacher_share=0.5")


def test_a_missing_teacher_is_named():
    assert "nowhere" in message_of(*MORE, "--run=student", "--teacher=nowhere")


@pytest.mark.parametrize("how", ["gone", "changed"])
def test_a_resumed_run_needs_the_same_teacher(how):
    assert train(*MORE, "--teacher=first", "--run=student") == 0
    kept = weights_of("first").parent
    shutil.copytree(kept, "moved")
    shutil.rmtree("first")
    if how == "changed":
        shutil.copytree(resolve_model_folder(Path("longer")), kept)
    message = message_of("--resume=student", "--max_steps=24")
    assert ("is gone" if how == "gone" else "has other weights than before") in message
    assert "name where it is now with --teacher=PATH" in message
    assert "has other weights" in message_of("--resume=student", "--max_steps=24", "--teacher=longer")
    flags = ("--teacher=moved", "--teacher=longer")
    assert "2 given, and the run was started with 1" in message_of("--resume=student", "--max_steps=24", *flags)
    assert train("--resume=student", "--max_steps=24", "--teacher=moved") == 0
    assert train("--resume=student", "--max_steps=26") == 0
