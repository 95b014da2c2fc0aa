"""Runs that diverge: what is saved, what they go back to, what the error says."""

import itertools
import math
import os
import random
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch

import train as train_script
from checkpoint import find_checkpoint, list_checkpoints, open_checkpoint, saved_steps
from tests.test_train import TINY, message_of, read_events, reproducible, tensors_of, train
from training import saving, setup
from training.divergence import MAX_ROLLBACKS, Diverged, limit, make_rollback

NAN = float("nan")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def spoil(monkeypatch, places, factor=NAN):
    """From here on the loss of the steps at these places in the order of the data is multiplied. Returns the places
    that the steps have read."""
    make_forward, read = setup.make_forward, []

    def make(state, *args):
        forward = make_forward(state, *args)

        def spoiled(*given, **named):
            read.append(state.data_step)
            return forward(*given, **named) * (factor if state.data_step in places else 1.0)

        return spoiled

    monkeypatch.setattr(setup, "make_forward", make)
    return read


# ---- the rules


def test_healthy_losses_are_never_far_above_and_spikes_are():
    for seed in range(20):
        draw, recent, lowest = random.Random(seed), list[float](), math.inf
        noise = draw.choice((0.01, 0.1, 0.3))
        for step in range(2000):
            loss = 2 + 8 * math.exp(-step / 300) + draw.gauss(0, noise)
            assert loss <= lowest
            recent = [*recent[-63:], loss]
            lowest = min(lowest, limit(recent))
        assert 2 + max(1, 11 * noise) + 0.5 > lowest


def chosen(step, since, checkpoints, before=(), rate=1e-3):
    rollback = make_rollback(Diverged("reason", since), step, rate, checkpoints, before)
    return None if rollback is None else (rollback["to"], rollback["passed_over"])


def rollback(step, to, rate=1e-3):
    return {"step": step, "to": to, "passed_over": step - to, "reason": "reason", "learning_rate": rate}


def test_a_run_goes_back_to_before_the_trouble_and_further_where_that_did_not_help():
    assert chosen(130, 127, [0, 50, 100, 128]) == (100, 30)
    assert chosen(130, 127, [0, 50, 100], [rollback(120, 100)]) == (50, 80)
    assert chosen(130, 127, [0, 50, 100, 120], [rollback(110, 100)]) == (120, 10)  # it has saved since
    assert chosen(130, 127, [0], [rollback(120, 0)]) == (0, 130)  # nothing is older: other data once more
    assert chosen(130, 127, [128]) is None


def test_rollbacks_are_bounded_but_for_those_of_long_ago_or_of_another_learning_rate():
    before = [rollback(100 + i, 50) for i in range(MAX_ROLLBACKS)]
    assert chosen(130, 127, [0, 50], before) is None
    assert chosen(130, 127, [0, 50], before, rate=3e-4) == (50, 80)
    assert chosen(1130, 1127, [0, 50, 1100], before) == (1100, 30)


# ---- what is saved


def test_weights_are_never_saved_in_trouble_and_are_as_soon_as_it_is_over(small_text, monkeypatch, capsys):
    spoil(monkeypatch, {9, 13, 14})
    save, saved = saving.save_checkpoint, []
    monkeypatch.setattr(saving, "save_checkpoint", lambda *args, **named: saved.append(args[1]) or save(*args, **named))
    assert train(*TINY, f"--data={small_text}", "--run=spiky", "--save_interval=5") == 0
    assert [event["step"] for event in read_events("spiky", "skip")] == [10, 14, 15]
    assert saved == [0, 5, 11, 16, 20, 20]  # not 10 and 15, but the steps after them; the last one again at the end
    assert "step 10: not saved: updates are being skipped" in capsys.readouterr().out


def test_weights_that_are_not_finite_are_not_saved(small_text, monkeypatch, capsys):
    advance = setup.TrainState.advance

    def spoiled(state, loss, norm):
        weight = state.model.get_parameter("blocks.1.mlp.up.weight")
        with torch.no_grad():
            if state.step == 9:
                weight.data[3, 5] = math.inf
            elif state.step == 10:
                weight.data[3, 5] = 0.0
        return advance(state, loss, norm)

    monkeypatch.setattr(setup.TrainState, "advance", spoiled)
    monkeypatch.setattr(train_script, "evaluate", lambda *args, **kwargs: None)
    train(*TINY, f"--data={small_text}", "--run=run", "--save_interval=5", "--keep_interval=5")
    assert "step 10: not saved: the weights blocks.1.mlp.up.weight are not finite" in capsys.readouterr().out
    assert 10 not in saved_steps(Path("run"))
    assert saved_steps(Path("run"))[-1] == 20


# ---- rollbacks


def test_data_that_makes_a_run_diverge_is_passed_over(small_text, monkeypatch, capsys):
    read = spoil(monkeypatch, {12, 13, 14, 15, 16})
    assert train(*TINY, f"--data={small_text}", "--run=run", "--learning_rate=2e-3") == 0
    read = [place for place, _ in itertools.groupby(read)]  # there are two micro-batches
    assert read == [*range(25)]  # in step 10 once more, that of 15; two skipped updates are none too many
    out = capsys.readouterr().out
    assert "rolled back to step 10; the data of steps 10 to 15 is passed over. At step 15 the run had diverged" in out
    assert read_events("run", "rollback")[-1]["reason"].startswith("3 updates in a row had no finite gradient")
    assert [event["step"] for event in read_events("run", "step")] == [4, 8, 12, 16, 20]
    assert open_checkpoint(list_checkpoints(Path("run"))[-1]).state["samples"] == 25 * 8


def test_a_run_that_is_killed_after_a_rollback_ends_in_the_same_bits(small_text, monkeypatch):
    spoil(monkeypatch, {12, 13, 14})
    command = [*TINY, f"--data={small_text}", "--save_interval=4"]
    assert train(*command, "--run=alone") == 0
    update = train_script.update
    for cut in (16, 19):  # at once, and after a save
        with monkeypatch.context() as patch:
            calls = itertools.count()

            def killed(*args, cut=cut, calls=calls):
                if next(calls) == cut:
                    raise KeyboardInterrupt
                return update(*args)

            patch.setattr(train_script, "update", killed)
            with pytest.raises(KeyboardInterrupt):
                train(*command, f"--run=cut {cut}")
        assert train(f"--resume=cut {cut}") == 0
        assert reproducible(f"cut {cut}") == reproducible("alone")
        assert tensors_of(f"cut {cut}", 20) == tensors_of("alone", 20)


def test_a_loss_that_stays_far_above_its_median_is_a_divergence(small_text, monkeypatch, capsys):
    monkeypatch.setattr("training.state.MAX_HIGH", 10)
    spoil(monkeypatch, {*range(31, 45)}, factor=5.0)
    arguments = [f"--data={small_text}", "--run=run", "--max_steps=60", "--save_interval=5"]
    assert train(*TINY, *arguments) == 0
    assert "for 10 steps the loss was far above its running median" in capsys.readouterr().out
    assert read_events("run", "rollback") == [
        {"event": "rollback", "step": 30, "diverged": 41, "reason": read_events("run", "rollback")[0]["reason"]}
    ]


def test_the_options_of_now_outlive_a_rollback(small_text, monkeypatch):
    """Those of a resumed run, too, though its checkpoint has others."""
    assert train(*TINY, f"--data={small_text}", "--run=run") == 0
    spoil(monkeypatch, {22, 23, 24})
    flags = ["--max_steps=30", "--log_interval=1", "--learning_rate=1e-4", "--sample_prompt=a 'b'\\n"]
    assert train("--resume=run", *flags) == 0
    assert read_events("run", "rollback")[0]["step"] == 20
    steps = read_events("run", "step")
    assert [event["step"] for event in steps[-10:]] == [*range(21, 31)]
    assert all(event["learning_rate"] <= 1e-4 for event in steps[-10:])
    assert open_checkpoint(list_checkpoints(Path("run"))[-1]).state["options"]["sample_prompt"] == "a 'b'\n"


@pytest.mark.parametrize("layer", ["blocks.1.mlp.up", "blocks.0.attn.qkv", "embed"])
def test_the_first_layer_that_is_not_finite_is_named(small_text, monkeypatch, layer):
    build = setup.build_model

    def built(*args):
        model = build(*args)
        calls = itertools.count()
        model.get_submodule(layer).register_forward_hook(
            lambda module, inputs, out: out * (math.inf if torch.is_grad_enabled() and next(calls) > 4 else 1.0)
        )
        return model

    monkeypatch.setattr(setup, "build_model", built)
    message = message_of(*TINY, f"--data={small_text}", "--run=run", "--micro_batch_size=8")
    assert f"not finite first: the activations of {layer}." in message


def test_gradients_that_are_not_finite_are_named(small_text, monkeypatch):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * NAN

    build = setup.build_model

    def built(*args):
        model = build(*args)
        model.blocks[1].attn.proj.register_forward_hook(lambda module, inputs, out: Broken.apply(out))
        return model

    monkeypatch.setattr(setup, "build_model", built)
    message = message_of(*TINY, f"--data={small_text}", "--run=run")
    assert "not finite first: the gradient of the activations of blocks.1.attn" in message


def test_the_command_of_a_run_that_ends_rescues_it(small_text, monkeypatch):
    """Where other data does not help. The command is executed."""
    with monkeypatch.context() as patch:
        spoil(patch, {*range(12, 1000)})
        message = message_of(*TINY, f"--data={small_text}", "--run=a run", "--schedule=constant")
    assert "It went back 3 times within 1,000 steps, and other data did not help" in message
    command = shlex.split(re.search(r"python train\.py (--resume.*)", message)[1])
    assert command[:2] == ["--resume=a run", "--from=step-0"]
    assert train(*command) == 0
    assert open_checkpoint(find_checkpoint(Path("a run"), "latest")).step == 20


@pytest.mark.parametrize(
    "flags",
    [
        ["--learning_rate=10"],
        ["--learning_rate=3", "--grad_clip=none"],
        ["--optimizer=sgd", "--learning_rate=30", "--grad_clip=none"],
        ["--optimizer=muon", "--learning_rate=30", "--muon_learning_rate=20", "--min_learning_rate=1"],
    ],
)
def test_a_learning_rate_that_is_far_too_high_is_rescued_by_the_printed_command(small_text, flags, monkeypatch):
    monkeypatch.setattr("training.state.MAX_HIGH", 15)
    rest = [f"--data={small_text}", "--run=run", "--max_steps=40", "--warmup_steps=20", "--sample_tokens=0"]
    message = message_of(*TINY, *rest, *flags)
    command = shlex.split(re.search(r"python train\.py (--resume.*)", message)[1])
    assert train(*command) == 0
    assert read_events("run", "eval")[-1]["val_loss"] < math.log(257)


# ---- --from


def test_a_run_goes_on_from_the_checkpoint_that_is_named(small_text, capsys):
    command = [*TINY, f"--data={small_text}", "--save_interval=5", "--keep_interval=5"]
    assert train(*command, "--run=run") == 0
    assert saved_steps(Path("run")) == [0, 5, 10, 15, 20]
    log, tensors = reproducible("run"), tensors_of("run", 20)
    for number, where in enumerate((["--resume=run", "--from=step-10"], ["--resume=run/checkpoints/step-00000010"])):
        assert train(*where) == 0
        out = capsys.readouterr().out
        assert "resumed run/checkpoints/step-00000010 at step 10" in out, number
        assert "kept aside are run/checkpoints/set-aside/step-00000015" in out
        assert (reproducible("run"), tensors_of("run", 20)) == (log, tensors)
    assert train("--resume=run", "--from=best", "--learning_rate=1e-4", "--max_steps=25") == 0
    assert reproducible("run") != log


def test_wrong_values_of_from_are_explained(run_of_20):
    for wrong in ("step-7", "7"):
        message = message_of("--resume=run", f"--from={wrong}")
        assert f"--from='{wrong}' is not in run; expected one of: best, latest, step-0, step-10, step-20" in message
    assert "add --resume=RUN" in message_of(*TINY, "--from=best")


def test_a_checkpoint_that_is_named_has_no_substitute(run_of_20):
    """Where it is damaged, the run does not go on from another one."""
    path = Path("run/checkpoints/step-00000010/optimizer.safetensors")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "step-00000010" in message_of("--resume=run", "--from=step-10", "--max_steps=30")
    assert saved_steps(Path("run")) == [0, 10, 20]


@pytest.fixture
def run_of_20(small_text):
    assert train(*TINY, f"--data={small_text}", "--run=run") == 0


# ---- a stop in trouble


@pytest.mark.skipif(os.name == "nt", reason="needs SIGTERM")
def test_a_run_that_is_stopped_in_trouble_says_what_is_saved(small_text, monkeypatch, capsys):
    spoil(monkeypatch, {12, 13})
    with monkeypatch.context() as patch:
        update, calls = train_script.update, itertools.count()

        def signalled(*args):
            if next(calls) == 12:
                os.kill(os.getpid(), signal.SIGTERM)
            return update(*args)

        patch.setattr(train_script, "update", signalled)
        assert train(*TINY, f"--data={small_text}", "--run=run") == 75
    assert "stopped; step 13 is not saved: updates are being skipped" in capsys.readouterr().out
    assert saved_steps(Path("run")) == [0, 10]
    assert train("--resume=run") == 0
