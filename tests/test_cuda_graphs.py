"""Decode steps of fixed shapes equal the plain step, and are recorded only when needed; here they run on a CPU."""

import pytest
import torch

import generation.engine as engine
from generation.cuda_graphs import GraphDecoder
from model import KVCache
from tests.test_generation import GREEDY, MODELS, replace, run, tiny_model


@pytest.mark.parametrize("name", MODELS)
def test_fixed_shapes_give_the_same_logits(monkeypatch, name):
    """Rows of unequal lengths, an end-of-sequence among the ids, rows that are prefilled again and rows that leave."""
    monkeypatch.setattr("generation.cuda_graphs.MIN_SPAN", 4)
    model = tiny_model(block_size=16, **MODELS[name])
    plain, fixed = (KVCache(model.config, 3, dtype=torch.float64) for _ in range(2))
    decoder = GraphDecoder(model)
    ids = torch.randint(0, 31, (3, 16), generator=torch.Generator().manual_seed(1))
    ids[0, 9] = model.config.eos_id
    for cache in (plain, fixed):
        model.prefill(ids[:, :4], [2, 1, 4], cache, [0, 1, 2])
    for step in range(14):
        if step == 5:
            for cache in (plain, fixed):
                model.prefill(ids[[1], :3], [3], cache, [1])
        if step == 9:
            for cache in (plain, fixed):
                cache.keep([1, 0])
        newest = ids[torch.arange(len(plain.host_lengths)), plain.lengths]
        expected = model.decode(newest, plain)
        torch.testing.assert_close(decoder.decode(newest, fixed), expected, atol=1e-12, rtol=0)
        for cache in (plain, fixed):
            assert cache.lengths.tolist() == cache.host_lengths == plain.host_lengths
    assert plain.longest == plain.capacity
    with pytest.raises(ValueError, match="is full"):
        decoder.decode(newest, fixed)


def test_generated_ids_are_the_same_and_each_span_is_recorded_once(monkeypatch):
    monkeypatch.setattr("generation.cuda_graphs.MIN_SPAN", 4)
    model = tiny_model(block_size=16)
    prompts = [[30], [30, 3, 1, 4], list(range(15)), [5, 6] * 20]
    options = replace(GREEDY, max_new_tokens=50)
    plain = run(model, prompts, options)
    spans, record = [], GraphDecoder.record
    monkeypatch.setattr(
        GraphDecoder, "record", lambda self, cache, span: spans.append(span) or record(self, cache, span)
    )
    monkeypatch.setattr(engine, "decoder_for", lambda model: GraphDecoder(model).decode)
    assert run(model, prompts, options) == plain
    assert spans == [16]  # one row has 15 tokens from the start
    spans.clear()
    run(model, [[1]], options)
    assert spans == [4, 8, 16]
