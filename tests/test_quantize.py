"""int8 weights: close to the float model, independent of the batch, refused if unsupported."""

from dataclasses import replace

import pytest
import torch

import generation.quantize as module
from errors import UserError
from generation.engine import next_logits
from generation.quantize import Int8Linear, quantize
from tests.test_generation import GREEDY, MODELS, run, tiny_model


@pytest.mark.parametrize("levels", [127, 63])
@pytest.mark.parametrize("bias", [True, False])
def test_products_are_those_of_rounded_numbers(levels, bias):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(40, 70, generator=generator), 5 * torch.randn(2, 3, 70, generator=generator)
    weight[7] = 0.0
    x[1, 2] = 0.0
    offset = torch.randn(40, generator=generator) if bias else None
    w_scale = weight.double().abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    x_scale = x.double().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30) / levels
    expected = (x / x_scale).round() * x_scale @ ((weight / w_scale).round() * w_scale).T
    actual = Int8Linear(weight, offset, levels)(x)
    assert actual.dtype == torch.float32
    expected = expected if offset is None else expected + offset
    torch.testing.assert_close(
        actual.double(), expected, atol=0.02, rtol=1e-4
    )  # 0.02: an input that lies halfway between two steps
    assert torch.equal(Int8Linear(weight, offset, levels)(x[1:, 1:2]), actual[1:, 1:2])  # independent of other rows


def test_nan_is_not_hidden():
    x = torch.ones(2, 8)
    x[1, 3] = torch.nan
    assert Int8Linear(torch.ones(4, 8), None, 127)(x).isnan().all(dim=1).tolist() == [False, True]


@pytest.mark.parametrize("name", ["learned", "rotary", "ngrams", "padded_vocabulary", "tied"])
def test_a_quantised_model_is_close_and_generates_the_same_in_every_batch(name):
    changes = {"tie_embeddings": True} if name == "tied" else MODELS[name]
    model = tiny_model(torch.float32, scale=4.0, **changes)
    text = [30, 1, 2, 3, 4]
    before = next_logits(model, text, 1)
    quantize(model)
    error = (next_logits(model, text, 1) - before).abs().max() / before.abs().max()
    assert 0 < error < 0.05
    prompts = [[30], [30, 1, 2], [5, 6, 7, 8, 9, 10]]
    options = replace(GREEDY, max_new_tokens=20)
    together = run(model, prompts, options)
    assert together == [run(model, [prompt], options)[0] for prompt in prompts]


def test_unsupported_dtypes_and_builds_are_refused(monkeypatch):
    with pytest.raises(UserError, match=r"--quantize=int8 works on a CPU in float32.*--device=cpu --dtype=float32"):
        quantize(tiny_model(torch.bfloat16))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(UserError, match="oneDNN"):
        quantize(tiny_model(torch.float32))


def test_inputs_have_seven_bits_without_vnni(tmp_path, monkeypatch):
    for flags, levels in (("fpu avx2 avx512_vnni", 127), ("fpu avx2", 63)):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
        monkeypatch.setattr(module, "Path", lambda _: tmp_path / "cpuinfo")
        assert module.input_levels() == levels
