"""The average of the weights: what is evaluated, sampled and saved; training itself does not see it."""

import pytest
import torch
from safetensors.torch import load_file

from errors import UserError
from model import GPT, GPTConfig
from tests.test_train import (  # noqa: F401  (a fixture)
    TINY,
    _in_a_folder_of_its_own,
    read_events,
    tensors_of,
    train,
)
from training.average import WeightAverage

SIZE = GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8, vocab_size=1100, eos_id=0)  # 1,100 rows are padded


@pytest.mark.parametrize("half_life", [0.1, 1.0])
def test_the_average_is_that_of_its_definition(half_life):
    """Half of the weight lies in the last half_life · steps: an average of the numbers 1, 2, 3 …"""
    model = GPT(SIZE, seed=0)
    average, expected = WeightAverage(model, half_life), 0.0
    for step in range(1, 101):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step)
        average.update(step)
        share = 1.0 if step == 1 else 1 - 0.5 ** (1 / max(1.0, half_life * step))
        expected += share * (step - expected)
    for tensor in average.tensors:
        assert torch.allclose(tensor, torch.full_like(tensor, expected), rtol=1e-4)
    # a half-life of h steps lags behind by h / ln 2 steps where it is constant; it was shorter before
    assert 100 - half_life * 100 / 0.69 < expected < 100


def test_swap_exchanges_values_and_keeps_addresses():
    model = GPT(SIZE, seed=0)
    average = WeightAverage(model, 0.1)
    with torch.no_grad():
        for tensor in average.tensors:
            tensor.add_(1.0)
    tensors = [*model.parameters(), *average.tensors]
    before, addresses = [tensor.clone() for tensor in tensors], [tensor.data_ptr() for tensor in tensors]
    average.swap()
    half = len(before) // 2
    assert all(map(torch.equal, tensors, before[half:] + before[:half]))
    average.swap()
    assert all(map(torch.equal, tensors, before))
    assert [tensor.data_ptr() for tensor in tensors] == addresses


def test_stored_weights_are_restored_without_padding():
    average = WeightAverage(model := GPT(SIZE, seed=0), 0.1)
    average.swap()
    stored = {name: tensor.clone() for name, tensor in average.stored().items()}
    assert stored["embed.weight/weight"].shape == (1100, 8)
    other = WeightAverage(fresh := GPT(SIZE, seed=1), 0.1)
    wanted = [parameter.detach().clone() for parameter in fresh.parameters()]
    other.restore(stored)
    assert not stored
    assert all(map(torch.equal, other.tensors, wanted))
    assert torch.equal(fresh.embed.weight[:1100], model.embed.weight[:1100])
    with pytest.raises(ValueError, match=r"embed\.weight/weight is missing"):
        other.restore({})


def test_training_does_not_see_the_average(small_text):
    """Losses of training and gradients are those of a run without one; val losses and the saved weights are not."""
    for run, flags in (("a", []), ("b", ["--ema_half_life=0.3"])):
        assert train(*TINY, f"--data={small_text}", f"--run={run}", *flags) == 0
    assert read_events("a", "step") == read_events("b", "step")
    assert read_events("a", "eval")[0] == read_events("b", "eval")[0]  # before the first step
    assert read_events("a", "final")[0]["val_loss"] != read_events("b", "final")[0]["val_loss"]
    a, b = (load_file(f"{run}/checkpoints/step-00000020/model/model.safetensors") for run in "ab")
    raw = load_file("b/checkpoints/step-00000020/optimizer.safetensors")
    assert a.keys() == b.keys()
    assert any(not torch.equal(a[name], b[name]) for name in a)
    embedding = next(tensor for name, tensor in a.items() if tensor.shape == raw["embed.weight/weight"].shape)
    assert torch.equal(embedding, raw["embed.weight/weight"])


def test_a_resumed_run_repeats_the_bits(small_text):
    """And the evaluation of --eval_only is that of the average."""
    flags = [*TINY, f"--data={small_text}", "--ema_half_life=0.3", "--eval_interval=5"]
    assert train(*flags, "--run=straight") == 0
    assert train(*flags, "--run=parts", "--max_steps=5") == 0
    assert train("--resume=parts", "--max_steps=20") == 0
    assert tensors_of("parts", 20) == tensors_of("straight", 20)
    assert read_events("parts", "eval")[-1] == read_events("straight", "eval")[-1]


def test_a_checkpoint_without_the_weights_themselves_is_an_error(small_text):
    assert train(*TINY, f"--data={small_text}", "--run=plain", "--max_steps=5") == 0
    with pytest.raises(UserError, match="ema_half_life"):
        train("--resume=plain", "--max_steps=10", "--ema_half_life=0.1")


def test_steps_without_evaluation_or_checkpoint_do_not_swap(small_text, monkeypatch):
    """Evaluations at steps 10 and 20, and the final records: two exchanges each."""
    swap, swaps = WeightAverage.swap, []

    def counted(self):
        swaps.append(None)
        swap(self)

    monkeypatch.setattr(WeightAverage, "swap", counted)
    assert train(*TINY, f"--data={small_text}", "--run=a", "--ema_half_life=0.3") == 0
    assert len(swaps) == 6
