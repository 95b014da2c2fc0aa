"""Decode steps and draws as CUDA graphs, on a stand-in for torch.cuda (tests/cuda_stub.py)."""

import gc
import weakref

import pytest
import torch

import generation.cuda_graphs as cuda_graphs
from errors import UserError
from generation.cuda_graphs import GraphDecoder
from generation.engine import generate
from generation.options import SamplingOptions
from generation.sampling import Penalties, draw, top_log_probs
from model import KVCache
from tests import cuda_stub
from tests.test_generation import GREEDY, MODELS, SAMPLED, replace, run, tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch):
    """The stub, with `recorded`: (id of the model's embedding, rows, span) of every decode step that is recorded."""
    stub = cuda_stub.install(monkeypatch)
    cuda_graphs.drop_kept()
    stub.recorded, step = [], GraphDecoder.record_step

    def record_step(self, cache, span):
        stub.recorded.append((self.model.embed.weight.data_ptr(), len(cache.host_lengths), span))
        return step(self, cache, span)

    monkeypatch.setattr(GraphDecoder, "record_step", record_step)
    yield stub
    cuda_graphs.drop_kept()


def events(model, prompts, options, **arguments):
    return list(generate(model, prompts, options, 3, **arguments))


def events_with_stops(model, prompts, options):
    """As a caller with stop strings gets them: sample i ends after 40 · (i + 1) tokens."""
    stopped, found, tokens = set(), [], [0] * len(prompts)
    for event in generate(model, prompts, options, 3, stopped=stopped):
        found.append(event)
        tokens[event.sample] += event.token is not None
        if tokens[event.sample] == 40 * (event.sample + 1):
            stopped.add(event.sample)
    return found


def same(found, expected):
    """Equal, log-probabilities up to rounding."""
    ids = [(event[:3], [token for token, _ in event.top]) for event in found]
    numbers = [(event.logprob or 0.0, *(value for _, value in event.top)) for event in found]
    assert ids == [(event[:3], [token for token, _ in event.top]) for event in expected]
    for row, event in zip(numbers, expected, strict=True):
        assert row == pytest.approx((event.logprob or 0.0, *(value for _, value in event.top)), abs=1e-9)
    return True


PROMPTS = [[30], [30, 3, 1, 4], [5, 6] * 40, list(range(29)), [30, 2, 30, 7]]
OPTIONS = {
    "greedy": GREEDY,
    "filters": replace(SAMPLED, min_p=0.01),
    "temperature": replace(SAMPLED, top_k=None, top_p=None),
    "penalties": replace(SAMPLED, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1),
    "logprobs": replace(SAMPLED, logprobs=2, min_new_tokens=8),
    "minimum": replace(SAMPLED, min_new_tokens=90, top_k=3),
}
CASES = [(name, "filters") for name in MODELS] + [("learned", name) for name in OPTIONS if name != "filters"]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_events_are_those_of_the_plain_loop(request, name, options):
    """Unequal rows that leave at different steps, a window that is cut, spans of 64, 128 and all 150 slots."""
    model = tiny_model(block_size=150, scale=6.0, **MODELS[name])
    going_on = replace(OPTIONS[options], max_new_tokens=190, stop_at_eos=False)
    ending = replace(OPTIONS[options], max_new_tokens=60)
    plain = events_with_stops(model, PROMPTS, going_on), events(model, PROMPTS, ending)
    cuda = request.getfixturevalue("cuda")
    assert same(events_with_stops(model, PROMPTS, going_on), plain[0])
    assert {size[1:] for size in cuda.recorded} >= {(8, 128), (4, 128), (4, 150), (2, 150)}
    assert same(events(model, PROMPTS, ending), plain[1])
    assert len(set(cuda.recorded)) == len(cuda.recorded), "recorded twice"
    cuda.recorded.clear()
    assert same(events_with_stops(model, PROMPTS, going_on), plain[0])
    assert cuda.recorded == [], "recorded again for a later request"


@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_give_the_same_logits(request, monkeypatch, name):
    """Rows of unequal lengths, an end-of-sequence among the ids, a row that is prefilled again and rows that leave."""
    monkeypatch.setattr(cuda_graphs, "MIN_SPAN", 4)
    model = tiny_model(block_size=16, **MODELS[name])
    request.getfixturevalue("cuda")
    decoder = GraphDecoder(model, 3, CPU, torch.float64)
    plain, fixed = KVCache(model.config, 3, dtype=torch.float64), decoder.new_cache(3)
    ids = torch.randint(0, 31, (3, 16), generator=torch.Generator().manual_seed(1))
    ids[2, 9], rows = model.config.eos_id, [0, 1, 2]
    for cache in (plain, fixed):
        model.prefill(ids[:, :4], [4, 1, 2], cache, rows)
    for step in range(14):
        for cache in (plain, fixed):
            if step == 5:
                model.prefill(ids[[1], :3], [3], cache, [1])
            if step == 9:
                cache.copy_row(2, 0)
                cache.narrow(2)
                rows = [2, 1]
        if step == 11:
            fixed.make_idle(1)
        newest = ids[rows, plain.lengths]
        expected, counted = model.decode(newest, plain), slice(None, 1 if step >= 11 else None)
        torch.testing.assert_close(decoder.decode(newest, fixed)[counted], expected[counted], atol=1e-12, rtol=0)
        assert fixed.lengths.tolist() == fixed.host_lengths
        assert fixed.host_lengths[counted] == plain.host_lengths[counted]
    assert fixed.longest == fixed.capacity
    with pytest.raises(ValueError, match="is full"):
        decoder.decode(newest, fixed)


@pytest.mark.parametrize("name", ["learned", "documents", "ngrams"])
def test_a_row_whose_sample_has_ended_never_fills(request, name):
    """Three of four rows go on through several windows; the fourth stays idle."""
    model = tiny_model(block_size=20, **MODELS[name])

    def found():
        stopped, seen = set(), []
        for event in generate(model, PROMPTS[:4], replace(GREEDY, max_new_tokens=70), 3, stopped=stopped):
            seen.append(event)
            if len(seen) == 20:
                stopped.add(1)
        return seen

    plain = found()
    cuda = request.getfixturevalue("cuda")
    assert found() == plain
    assert {rows for _, rows, _ in cuda.recorded} == {4}


@pytest.mark.parametrize("count", [1, 8, 9, 10])
def test_a_sample_that_the_caller_stops_has_no_later_event(cuda, count):
    """Not even one of the step that was queued before."""
    model, stopped, seen = tiny_model(block_size=32), set(), []
    for event in generate(model, [[30, 1]], GREEDY, 0, stopped=stopped):
        seen.append(event.token)
        if len(seen) == count:
            stopped.add(0)
    assert seen == run(model, [[30, 1]], GREEDY)[0][0][:count]


def test_memory_that_is_kept_is_freed_before_a_batch_is_halved(cuda, monkeypatch):
    model, other = tiny_model(block_size=32), tiny_model(block_size=32)
    expected = run(model, [[30, i] for i in range(4)], GREEDY)
    run(other, [[1]], GREEDY)
    prefill, kept = type(model).prefill, []

    def fail_once(self, ids, *args):
        kept.append(sum(map(len, cuda_graphs._kept.values())))
        if len(kept) == 1:
            raise torch.OutOfMemoryError("x")
        return prefill(self, ids, *args)

    monkeypatch.setattr(type(model), "prefill", fail_once)
    assert run(model, [[30, i] for i in range(4)], GREEDY) == expected
    assert kept == [1, 0, 0]  # the other model's; then none, and the first half's, which is lent again


def test_the_device_is_one_step_ahead_of_python(cuda):
    """Step t + 1 is queued before the ids of step t are waited for, and none after the last."""
    model = tiny_model(block_size=64)
    options = replace(GREEDY, max_new_tokens=5)
    run(model, [[1]], options)  # records
    cuda.log.clear()
    run(model, [[1]], options)
    step = ["replay", "replay", "copy"]  # decode, draw, ids to the host
    assert cuda.log == [*step, *[*step, "wait"] * 4, "wait"]


def test_a_step_makes_no_copy_to_the_device_but_the_uniform_numbers(cuda, monkeypatch):
    sent = []
    monkeypatch.setattr("generation.batch.to_device", lambda *args: sent.append(args) or args_to_tensor(*args))
    run(tiny_model(block_size=64), [[1], [2]], replace(SAMPLED, max_new_tokens=32, stop_at_eos=False))
    assert len(sent) == 2 + 2  # the newest ids and the end-of-sequence id at the start, 32 steps of numbers


def args_to_tensor(values, dtype, device):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [
        GREEDY,
        SamplingOptions(temperature=0.7),
        SamplingOptions(top_k=3, top_p=0.9, min_p=0.1),
    ],
    ids=["greedy", "temperature", "filters"],
)
def test_a_draw_reads_no_number_on_the_host(options):
    """On the meta device there are no numbers to read: what would wait for a GPU fails."""
    logits, uniforms = torch.empty(2, 9, device="meta"), torch.empty(2, dtype=torch.float64, device="meta")
    drawn = draw(logits, uniforms, options)
    assert drawn.shape == (2,)
    top_log_probs(logits, drawn, 3)
    penalties = Penalties([[1], [2]], 9, replace(options, presence_penalty=1.0), CPU)
    penalties.seen, penalties.generated = penalties.seen.to("meta"), penalties.generated.to("meta")
    penalties.apply(logits)
    penalties.add(drawn)


@pytest.mark.parametrize("wait", [torch.Tensor.item, torch.Tensor.nonzero, bool, lambda x: x + torch.tensor(1)])
def test_the_stub_refuses_to_record_what_waits_for_the_host(wait):
    with pytest.raises(RuntimeError, match="not permitted"), torch.inference_mode(), cuda_stub.Capture():
        wait(torch.ones(1))


# ---- lending


def test_a_decoder_from_inference_mode_serves_outside_of_it(cuda):
    model, prompts = tiny_model(block_size=32), [[30, 1], [30, 1], [4]]
    with torch.inference_mode():
        inside = run(model, prompts, GREEDY)
    assert run(model, prompts, GREEDY) == inside
    assert len(cuda.recorded) == 1


def test_two_generators_at_once_do_not_share_a_cache(cuda):
    model = tiny_model(block_size=32)
    prompts = [[30, 1], [4, 5, 6]]
    expected = [events(model, [prompt], GREEDY) for prompt in prompts]
    together = [generate(model, [prompt], GREEDY, 3) for prompt in prompts]
    found = [list(pair) for pair in zip(*zip(*together, strict=True), strict=True)]
    assert found == expected
    cuda.recorded.clear()
    together = [generate(model, [prompt], GREEDY, 3) for prompt in prompts]
    assert [list(pair) for pair in zip(*zip(*together, strict=True), strict=True)] == expected
    assert cuda.recorded == []  # both decoders were kept


@pytest.mark.parametrize("end", ["closed", "dropped", "stopped"])
def test_a_request_that_ends_early_returns_its_decoder(cuda, end):
    model, stopped = tiny_model(block_size=32), set()
    expected = run(model, [[30, 1]] * 3, GREEDY)
    cuda.recorded.clear()
    generator = generate(model, [[30, 1]] * 3, GREEDY, 0, stopped=stopped)
    next(generator)
    if end == "closed":
        generator.close()
    elif end == "stopped":
        stopped |= {0, 1, 2}
        assert all(event.token is not None for event in generator)  # the rest of the step that was being read
    else:
        del generator
    assert run(model, [[30, 1]] * 3, GREEDY) == expected
    assert cuda.recorded == []


def test_fewer_rows_use_a_larger_cache_and_no_row_count_is_recorded_twice(cuda):
    model = tiny_model(block_size=32)
    for count in (4, 3, 2, 1, 4):
        expected = run(model, [[30, i] for i in range(count)], GREEDY)
        assert [len(ids) for ids, _ in expected] == [10] * count
    assert [rows for _, rows, _ in cuda.recorded] == [4, 2, 1]
    assert [each.rows for each in cuda_graphs._kept[model]] == [4]


@pytest.mark.parametrize("change", ["data", "half", "head"])
def test_moved_weights_are_recorded_again_and_changed_ones_are_not(cuda, change):
    model = tiny_model(block_size=32)
    run(model, [[30, 1]], GREEDY)
    cuda.recorded.clear()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = run(model, [[30, 1]], GREEDY)
    assert cuda.recorded == []  # in the same memory, as by an optimizer
    if change == "data":
        for parameter in model.parameters():
            parameter.data = parameter.data + 0.01 * parameter.data.flip(0)
    elif change == "half":
        model.to(torch.float32)
    else:
        model.head.weight = torch.nn.Parameter(model.head.weight.flip(0))
    moved = run(model, [[30, 1]], GREEDY)
    assert cuda.recorded != []
    assert len(cuda_graphs._kept[model]) == 1
    cuda_graphs.drop_kept()
    assert run(model, [[30, 1]], GREEDY) == moved
    if change != "half":
        assert moved != after


def test_what_is_kept_goes_with_the_model(cuda):
    model = tiny_model(block_size=32)
    run(model, [[30, 1]], GREEDY)
    [decoder] = cuda_graphs._kept[model]
    memory = weakref.ref(decoder.whole.memory)
    gc.disable()
    try:
        del decoder, model
        assert memory() is None
    finally:
        gc.enable()


def test_kept_memory_is_bounded(cuda, monkeypatch):
    models = [tiny_model(block_size=32) for _ in range(3)]
    run(models[0], [[1]], GREEDY)
    [decoder] = cuda_graphs._kept[models[0]]
    monkeypatch.setattr(cuda_graphs, "MAX_KEPT_BYTES", 2 * decoder.bytes)
    del decoder
    for i in (1, 0, 2):
        run(models[i], [[1]], GREEDY)
    assert [len(cuda_graphs._kept.get(model, [])) for model in models] == [1, 0, 1]  # 1 was used least recently
    run(models[0], [[1], [2], [3]], GREEDY)  # four rows are more than may be kept
    assert [len(cuda_graphs._kept.get(model, [])) for model in models] == [0, 0, 0]


@pytest.mark.parametrize("options", [GREEDY, replace(GREEDY, presence_penalty=0.1)], ids=["recorded", "penalties"])
def test_a_failed_request_leaves_nothing_behind(cuda, options):
    """The step after a failed draw gets an id that exists; NaN in the cache would pass the mask of a later request."""
    model = tiny_model(block_size=32)
    expected = run(model, [[30]], GREEDY)
    with torch.no_grad():
        weight = model.blocks[0].attn.qkv.weight
        before = weight.clone()
        weight.fill_(torch.nan)
        with pytest.raises(UserError, match="not finite"):
            run(model, [[30, 1, 2, 3, 4, 5], [7]], options)
        generator = generate(model, [[30, 1, 2, 3, 4, 5]], replace(GREEDY, max_new_tokens=0), 0)
        assert next(generator).reason == "length"
        generator.close()
        weight.copy_(before)
    assert run(model, [[30]], GREEDY) == expected


def test_autocast_records_its_casts(cuda):
    """Under autocast, with weights that change between two generations, as in training."""
    model = tiny_model(torch.float32, block_size=32)
    prompts = [[30, 1, 2], [30]]

    def plain():
        with pytest.MonkeyPatch.context() as patch:
            for module in ("transfer", "batch", "engine"):
                patch.setattr(f"generation.{module}.is_gpu", lambda device: False)
            return run(model, prompts, GREEDY)

    found = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(run(model, prompts, GREEDY))
            assert found[-1] == plain()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.flip(0))
    assert found[0] != found[1]
    assert len(cuda.recorded) == 1
    assert run(model, prompts, GREEDY) == plain()
    assert len(cuda.recorded) == 2  # without autocast


def test_hooks_are_called_at_every_step(cuda):
    model, calls = tiny_model(block_size=32), []
    handle = model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with_hook = run(model, [[30, 1, 2]], GREEDY)
    handle.remove()
    assert len(calls) == 1 + 10  # the prefill and every step
    assert cuda.recorded == []
    assert run(model, [[30, 1, 2]], GREEDY) == with_hook
