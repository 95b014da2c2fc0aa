"""Decoding with fixed shapes computes what the plain step does; recordings are made only where they must be."""

import pytest
import torch

import generation.engine as engine
from generation.static import StaticDecoder
from model import KVCache
from tests.test_generation import GREEDY, MODELS, replace, run, tiny_model


@pytest.mark.parametrize("name", MODELS)
def test_fixed_shapes_give_the_same_logits(monkeypatch, name):
    """Unequal rows, an end-of-sequence among the ids, rows that are read anew and rows that leave."""
    monkeypatch.setattr("generation.static.SHORTEST", 4)
    model = tiny_model(block_size=16, **MODELS[name])
    plain, fixed = (KVCache(model.config, 3, dtype=torch.float64) for _ in range(2))
    decoder = StaticDecoder(model)
    ids = torch.randint(0, 31, (3, 16), generator=torch.Generator().manual_seed(1))
    ids[0, 9] = model.config.eos_id
    for cache in (plain, fixed):
        model.prefill(ids[:, :4], torch.tensor([2, 1, 4]), cache, torch.arange(3))
    for step in range(14):
        if step == 5:
            for cache in (plain, fixed):
                model.prefill(ids[[1], :3], torch.tensor([3]), cache, torch.tensor([1]))
        if step == 9:
            for cache in (plain, fixed):
                cache.keep([1, 0])
        newest = ids[torch.arange(len(plain.host_lengths)), plain.lengths]
        expected = model.decode(newest, plain)
        torch.testing.assert_close(decoder.decode(newest, fixed), expected, atol=1e-12, rtol=0)
        assert plain.host_lengths == fixed.host_lengths
    assert plain.longest == plain.capacity
    with pytest.raises(ValueError, match="is full"):
        decoder.decode(newest, fixed)


def test_generated_ids_are_the_same_and_each_length_is_recorded_once(monkeypatch):
    monkeypatch.setattr("generation.static.SHORTEST", 4)
    model = tiny_model(block_size=16)
    prompts = [[30], [30, 3, 1, 4], list(range(15)), [5, 6] * 20]
    options = replace(GREEDY, max_new_tokens=50)
    plain = run(model, prompts, options)
    recorded = []
    prepare = StaticDecoder._prepare
    monkeypatch.setattr(
        StaticDecoder, "_prepare", lambda self, static: recorded.append(static.places) or prepare(self, static)
    )
    monkeypatch.setattr(engine, "decoder_for", lambda model: StaticDecoder(model).decode)
    assert run(model, prompts, options) == plain
    assert recorded == [16]  # a row of 15 is there from the start
    recorded.clear()
    run(model, [[1]], options)
    assert recorded == [4, 8, 16]
