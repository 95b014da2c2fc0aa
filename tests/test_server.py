"""The local server over real connections: the openai package, errors, the queue, access control, shutdown."""

import importlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from urllib.parse import urlsplit

import openai
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import config
import sample
from common.tokenizer import bytes_tokenizer, char_tokenizer
from errors import UserError
from generation.options import SamplingOptions
from generation.text import prompt_ids, stream_texts
from model import GPT, GPTConfig
from server import completions
from server.app import MAX_BODY, PAGE, Queue, Server, listen, make_app
from server.completions import MAX_PROMPT_TOKENS, MAX_SAMPLES, RequestError, ServedModel, parse_request
from server.options import ServerOptions
from server.tokenization import detokenize, tokenize
from tests.test_generation import tiny_model
from tests.test_sample import save

TOKENIZER = bytes_tokenizer()
EOS = TOKENIZER.eos_id
MODEL = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=257, eos_id=EOS), seed=3).eval()
SERVED = ServedModel(
    "notes", MODEL, TOKENIZER, SamplingOptions(max_new_tokens=50, temperature=0.7, stop=("\n",)), 1_700_000_000
)
ENDLESS = {"prompt": "x", "max_tokens": 30_000, "min_tokens": 30_000}  # takes more than a minute


@contextmanager
def running(served=SERVED, options=None):
    """Runs a server in a thread; yields its address and its queue."""
    options = options or ServerOptions(serve=True, port=0)
    queue, listening = Queue(), listen(options)
    server = Server(make_app(served, options, queue, {"prompt": "Once", "n": 2}), queue)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", queue
    finally:
        server.handle_exit(signal.SIGINT, None)
        thread.join(20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def url():
    with running() as (address, _):
        yield address


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as opened:
        yield opened


def ask(url, method="GET", path="/v1/completions", body=None, headers=None):
    """Sends a request; returns status, headers, content (decoded if it is JSON)."""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=30)
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    connection.request(method, path, data, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    is_json = response.headers["content-type"] == "application/json"
    return response.status, response.headers, json.loads(content) if is_json else content


def post(url, **body):
    status, _, content = ask(url, "POST", body=body)
    assert status == 200, content
    return content


def written(ids, seed, n=1, **changes):
    """The texts of stream_texts, without a server."""
    options = SamplingOptions(**({"max_new_tokens": 16, "temperature": 1.0} | changes))
    texts = [""] * n
    for piece in stream_texts(MODEL, TOKENIZER, [ids] * n, options, seed):
        texts[piece.sample] += piece.text
    return texts


def ids_of(text):
    return [EOS, *TOKENIZER.encode(text).tolist()]


# ---- the openai package


def test_the_openai_package_lists_the_model(client):
    (entry,) = client.models.list()
    assert (entry.id, entry.object, entry.created) == ("notes", "model", 1_700_000_000)
    assert client.models.retrieve("notes").id == "notes"
    with pytest.raises(openai.NotFoundError, match="unknown model 'other'; this server has 'notes'"):
        client.models.retrieve("other")


def test_the_openai_package_gets_completions_with_its_defaults(client):
    answer = client.completions.create(model="notes", prompt="Once", n=3, seed=7, user="me")
    assert [choice.text for choice in answer.choices] == written(ids_of("Once"), 7, 3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.object == "text_completion"
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.total_tokens == 5 + answer.usage.completion_tokens
    assert answer.choices[0].logprobs is None


def test_the_openai_package_streams_the_same_samples(client):
    request = {
        "model": "notes",
        "prompt": ["Once", "世"],
        "n": 2,
        "seed": 9,
        "max_tokens": 60,
        "temperature": 1.5,
        "logprobs": 2,
    }
    response = client.completions.create(**request)
    texts, reasons, usages, tokens = [""] * 4, [None] * 4, [], [[] for _ in range(4)]
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        assert chunk.id.startswith("cmpl-")
        usages.append(chunk.usage)
        for choice in chunk.choices:
            assert reasons[choice.index] is None, "text after the end"
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in response.choices]
    assert texts == written(ids_of("Once"), 9, 2, max_new_tokens=60, temperature=1.5) + written(
        ids_of("世"), 9, 2, max_new_tokens=60, temperature=1.5
    )
    assert reasons == [choice.finish_reason for choice in response.choices]
    assert tokens == [choice.logprobs.tokens for choice in response.choices]
    assert usages[:-1] == [None] * (len(usages) - 1)
    assert usages[-1] == response.usage


def test_the_openai_package_passes_extra_options(client):
    changes = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3, "temperature": 0.9, "top_p": 0.8}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": 0.25}
    extra = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3, "min_tokens": 12}
    answer = client.completions.create(
        model="notes", prompt="a", seed=1, temperature=0.9, top_p=0.8, **penalties, extra_body=extra
    )
    assert [answer.choices[0].text] == written(ids_of("a"), 1, **changes, **penalties, min_new_tokens=12)


def test_the_openai_package_raises_the_matching_errors(client):
    with pytest.raises(openai.BadRequestError, match=r"temperature = 'hot': expected a number >= 0") as error:
        client.completions.create(model="notes", prompt="a", temperature="hot")
    assert (error.value.param, error.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="this server has one model, 'notes'") as error:
        client.completions.create(model="gpt-3.5-turbo-instruct", prompt="a")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="no chat endpoint"):
        client.chat.completions.create(model="notes", messages=[])


# ---- requests and responses


def test_samples_equal_those_of_sample_py(tmp_path, capsys):
    _, model = save(tmp_path, 1, TOKENIZER, seed=5)
    flags = [
        f"--run={tmp_path}",
        "--prompt=Es war",
        "--num_samples=3",
        "--max_new_tokens=40",
        "--temperature=1.2",
        "--seed=11",
    ]
    assert sample.main([*flags, "--stop=e"]) == 0
    texts = capsys.readouterr().out.removesuffix("\n").split("\n---\n")
    with running(replace(SERVED, model=model.eval())) as (address, _):
        answer = post(address, prompt="Es war", n=3, max_tokens=40, temperature=1.2, seed=11, stop="e")
    assert ["Es war" + choice["text"] for choice in answer["choices"]] == texts


def test_a_random_seed_is_reported(url):
    first, second = post(url), post(url)
    assert first["seed"] != second["seed"]
    assert post(url, seed=first["seed"])["choices"] == first["choices"]


@pytest.mark.parametrize(
    "prompt", ["né", ["né"], [EOS, 110, 195, 169], [[EOS, 110, 195, 169]]], ids=["text", "texts", "ids", "lists"]
)
def test_prompts_as_text_and_as_ids(url, prompt):
    assert post(url, prompt=prompt, seed=2)["choices"][0]["text"] == written(ids_of("né"), 2)[0]


def test_ids_are_used_unchanged_and_no_prompt_starts_a_new_document(url):
    assert post(url, prompt=[110], seed=2)["choices"][0]["text"] == written([110], 2)[0]
    assert (
        post(url, seed=2)["choices"][0]["text"]
        == post(url, prompt="", seed=2)["choices"][0]["text"]
        == written([EOS], 2)[0]
    )


def test_finish_and_stop_reasons(url):
    choice = post(url, prompt="a", seed=4, max_tokens=5, min_tokens=5)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "length")
    long = post(url, prompt="a", seed=4, max_tokens=3000, temperature=1.5)["choices"][0]
    assert (long["finish_reason"], long["stop_reason"]) == ("stop", "end of sequence")
    stop = long["text"][10:12]
    choice = post(url, prompt="a", seed=4, max_tokens=3000, temperature=1.5, stop=["never there", stop])["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "stop string")
    assert choice["text"] == long["text"][: long["text"].index(stop)]


def test_logprobs_and_echo_agree_with_the_model(url):
    text, new = "né!", 6
    answer = post(url, prompt=text, echo=True, logprobs=3, max_tokens=new, min_tokens=new, seed=1)
    ((choice), found) = answer["choices"][0], answer["choices"][0]["logprobs"]
    assert choice["text"].startswith(text)
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": new, "total_tokens": 5 + new}
    assert found["tokens"][:4] == ["n", r"bytes:\xc3", r"bytes:\xa9", "!"]
    assert found["text_offset"][:5] == [0, 1, 1, 2, 3]
    names = [*(chr(i) if i < 128 else rf"bytes:\x{i:02x}" for i in range(256)), "<|endoftext|>"]
    ids = [EOS] + [names.index(token) for token in found["tokens"]]
    expected = MODEL(torch.tensor([ids]))[0].log_softmax(-1)
    for t in range(4 + new):
        assert found["token_logprobs"][t] == pytest.approx(expected[t, ids[t + 1]].item(), abs=1e-5)
        likeliest = expected[t].topk(3).indices.tolist()
        assert found["top_logprobs"][t].keys() == {names[i] for i in [*likeliest, ids[t + 1]]}
    only = post(url, prompt=text, echo=True, logprobs=3, max_tokens=0)["choices"][0]
    assert only["text"] == text
    assert only["logprobs"]["token_logprobs"] == found["token_logprobs"][:4]
    by_ids = post(url, prompt=ids_of(text), echo=True, logprobs=0, max_tokens=0)["choices"][0]
    assert by_ids["text"] == text
    assert by_ids["logprobs"]["tokens"] == ["<|endoftext|>", *found["tokens"][:4]]
    assert by_ids["logprobs"]["token_logprobs"] == [None, *found["token_logprobs"][:4]]
    assert by_ids["logprobs"]["top_logprobs"][:1] == [None]


def greedy_end(model, before=()):
    """A text after which (and after the ids `before`) the model's likeliest token is EOS."""
    texts = list(map("".join, itertools.product("abcdefghij", repeat=3)))
    ids = torch.tensor([[*before, *TOKENIZER.encode(text).tolist()] for text in texts])
    return texts[(model(ids)[:, -1].argmax(-1) == EOS).nonzero()[0].item()]


def ending_model():
    """A model whose likeliest token varies with the text and is EOS after a few percent of texts."""
    sizes = {"vocab_size": 257, "eos_id": EOS, "block_size": 32, "tie_embeddings": False}
    model = tiny_model(torch.float32, scale=5.0, **sizes)
    with torch.no_grad():
        model.head.weight[EOS] *= 3
    return model


@pytest.fixture(scope="module")
def ending():
    """A server and its model."""
    model = ending_model()
    with running(replace(SERVED, model=model)) as (address, _):
        yield address, model


@pytest.mark.parametrize("stream", [False, True])
def test_a_drawn_end_of_text_is_a_token_without_text(ending, stream):
    url, model = ending
    text = greedy_end(model, [EOS])
    ids = ids_of(text)
    expected = model(torch.tensor([ids]))[0].log_softmax(-1)
    scores = [expected[t, ids[t + 1]].item() for t in range(len(ids) - 1)] + [expected[-1, EOS].item()]
    request = {"prompt": [text, ids[1:]], "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
    if stream:
        data = ask(url, "POST", body=request | {"stream": True, "stream_options": {"include_usage": True}})[2].decode()
        *chunks, last, _ = [event.removeprefix("data: ") for event in data.removesuffix("\n\n").split("\n\n")]
        parts = [part for chunk in chunks for part in json.loads(chunk)["choices"] if part["index"] == 0]
        choice = parts[-1] | {"text": "".join(part["text"] for part in parts)}
        choice["logprobs"] = {
            name: [entry for part in parts for entry in part["logprobs"][name]] for name in choice["logprobs"]
        }
        usage, others = json.loads(last)["usage"], None
    else:
        answer = post(url, **request)
        (choice, others), usage = answer["choices"], answer["usage"]
    found = choice["logprobs"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", "end of sequence")
    assert found["tokens"] == [*text, "<|endoftext|>"]
    assert found["text_offset"] == [*range(len(text)), len(text)]
    assert found["token_logprobs"] == pytest.approx(scores, abs=1e-5)
    assert found["top_logprobs"][-1] == {"<|endoftext|>": found["token_logprobs"][-1]}
    if others is not None:  # the ids alone: no EOS before them
        assert others["logprobs"]["tokens"][: len(text)] == list(text)
        drawn = sum(len(one["logprobs"]["tokens"]) - len(text) for one in answer["choices"])
        assert usage == {"prompt_tokens": 7, "completion_tokens": drawn, "total_tokens": 7 + drawn}
    alone = post(url, prompt=text, max_tokens=3, temperature=0)
    assert (alone["choices"][0]["text"], alone["usage"]["completion_tokens"]) == ("", 1)
    none = post(url, prompt=text, max_tokens=0, echo=True, logprobs=1)  # nothing is drawn
    assert none["choices"][0]["logprobs"]["tokens"] == list(text)
    assert (none["choices"][0]["finish_reason"], none["usage"]["completion_tokens"]) == ("length", 0)


def test_one_drawn_token_follows_every_prompt_of_a_batch(ending):
    """What lm-evaluation-harness relies on: it leaves out the last token and sums those after the context."""
    url, model = ending
    prompts = [ids_of(text)[1:] for text in (greedy_end(model), "né", "x" * 32)]
    answer = post(url, prompt=prompts, max_tokens=1, temperature=0, echo=True, logprobs=1)
    assert answer["choices"][0]["logprobs"]["tokens"][-1] == "<|endoftext|>"
    for ids, choice in zip(prompts, answer["choices"], strict=True):
        expected = model(torch.tensor([ids]))[0].log_softmax(-1)
        scores = [expected[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
        assert len(choice["logprobs"]["tokens"]) == len(ids) + 1
        assert choice["logprobs"]["token_logprobs"][1:-1] == pytest.approx(scores, abs=1e-5)


def test_the_chunks_of_a_stream_add_up_to_the_response(url):
    request = {"prompt": ["ab", "世"], "n": 2, "echo": True, "logprobs": 1, "seed": 3}
    _, headers, stream = ask(url, "POST", body=request | {"stream": True})
    assert headers["content-type"].startswith("text/event-stream")
    events = stream.decode().removesuffix("\n\n").split("\n\n")
    assert events[-1] == "data: [DONE]"
    response, parts = (
        post(url, **request),
        [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]],
    )
    for choice in response["choices"]:
        own = [part for part in parts if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in own) == choice["text"]
        for name in choice["logprobs"]:
            assert [entry for part in own for entry in part["logprobs"][name]] == choice["logprobs"][name]


# ---- the tokenizer's routes


def tokenizer_answer(url, path, **body):
    status, _, content = ask(url, "POST", path, body)
    assert status == 200, content
    return content


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30))
@example("a<|endoftext|>b")  # text, but for the start
def test_texts_come_back_from_their_ids_and_are_read_so(text):
    ids, named = TOKENIZER.encode(text).tolist(), f"<|endoftext|>{text}"
    for prompt, special, expected in (
        (text, False, ids),
        (text, True, [EOS, *ids]),
        (named, False, [EOS, *ids]),
        (named, True, [EOS, *ids]),
    ):
        answer = tokenize(json.dumps({"prompt": prompt, "add_special_tokens": special}).encode(), SERVED)
        assert (answer["tokens"], answer["count"]) == (expected, len(expected))
        back = detokenize(json.dumps({"tokens": answer["tokens"]}).encode(), SERVED)["prompt"]
        assert back == (named if expected[:1] == [EOS] else text)
        if special:
            [read] = parse_request(json.dumps({"prompt": prompt}).encode(), SERVED).prompts
            assert (read.ids, read.text) == (expected, text)
            assert read.prepended == (prompt == text)  # a named one is the client's own, so it is listed


def test_the_tokenizer_is_served_as_vllm_serves_it(url):
    assert tokenizer_answer(url, "/tokenize", prompt="né", model="notes", return_token_strs=True) == {
        "count": 4,
        "max_model_len": 32,
        "tokens": [EOS, 110, 195, 169],
        "token_strs": ["<|endoftext|>", "n", r"bytes:\xc3", r"bytes:\xa9"],
    }
    plain = tokenizer_answer(url, "/tokenize", prompt="né", add_special_tokens=False)
    assert (plain["tokens"], plain["token_strs"]) == ([110, 195, 169], None)
    assert tokenizer_answer(url, "/detokenize", tokens=[EOS, 110, 195, 169, EOS, EOS]) == {
        "prompt": "<|endoftext|>né" + 2 * "<|endoftext|>"
    }
    assert tokenizer_answer(url, "/detokenize", tokens=[]) == {"prompt": ""}
    assert tokenizer_answer(url, "/detokenize", tokens=[195]) == {"prompt": "\ufffd"}
    status, _, info = ask(url, "GET", "/tokenizer_info")
    assert (status, info["bos_token"], info["eos_token"]) == (200, "<|endoftext|>", "<|endoftext|>")
    assert (info["model_max_length"], info["vocab_size"], "chat_template" in info) == (32, 257, False)
    no_start = replace(SERVED, sampling=replace(SERVED.sampling, prepend_eos=False))
    assert tokenize(b'{"prompt": "a"}', no_start)["tokens"] == [97]
    other_start = bytes_tokenizer()
    other_start.start_id = 1
    served = replace(SERVED, tokenizer=other_start)
    assert tokenize(b'{"prompt": "a"}', served)["tokens"] == [1, 97] == prompt_ids(other_start, "a", True)


@pytest.mark.parametrize(
    ("path", "body", "param", "message"),
    [
        ("/tokenize", b"{", None, "not valid JSON"),
        ("/tokenize", {}, "prompt", "prompt = None: expected a text"),
        ("/tokenize", {"prompt": ["a"]}, "prompt", "expected a text"),
        ("/tokenize", {"prompt": "a\ud800"}, "prompt", "surrogate"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 0}, "add_special_tokens", "expected true or false"),
        ("/tokenize", {"messages": []}, "messages", "unknown field 'messages'.*known fields are model, prompt"),
        ("/tokenize", {"prompt": "a", "model": "gpt2"}, "model", "this server has one model, 'notes'"),
        ("/detokenize", {}, "tokens", "tokens = None: expected a list of token ids"),
        ("/detokenize", {"tokens": [1, 257]}, "tokens", r"tokens\[1\] = 257: expected a token id, 0 to 256"),
        ("/detokenize", {"tokens": [True]}, "tokens", r"tokens\[0\] = True"),
        ("/detokenize", {"prompt": "a"}, "prompt", "unknown field"),
        ("/detokenize", {"tokens": [1], "model": "gpt2"}, "model", "this server has one model, 'notes'"),
    ],
)
def test_errors_of_the_tokenizers_routes(url, path, body, param, message):
    status, _, content = ask(url, "POST", path, body)
    assert status == (404 if param == "model" else 400)
    assert content["error"]["param"] == param
    assert re.search(message, content["error"]["message"])


def test_a_character_that_the_vocabulary_lacks_is_refused():
    letters = replace(SERVED, tokenizer=char_tokenizer("ab"))
    with pytest.raises(RequestError, match=r"prompt: .*'c'"):
        tokenize(b'{"prompt": "abc"}', letters)
    assert tokenize(b'{"prompt": "<|endoftext|>", "add_special_tokens": false}', letters)["tokens"] == [2]


# ---- errors


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        (b"", None, "not valid JSON"),
        (b"{", None, "not valid JSON"),
        (b'{"prompt": "\xff"}', None, "not UTF-8: byte 0xff at offset 12"),
        (b"[" * 100_000, None, "not valid JSON"),
        (b"[]", None, "not a JSON object"),
        (b'{"temperature": NaN}', None, "not valid JSON"),
        (b'{"temperature": 1e999}', "temperature", "temperature = inf: expected a number >= 0"),
        (b'{"max_tokens": ' + b"9" * 5000 + b"}", None, "not valid JSON"),
        ({"temprature": 1}, "temprature", "unknown field .*did you mean temperature"),
        ({"\ud800": 1}, "\ud800", "unknown field"),
        ({"temperature": -1}, "temperature", "temperature = -1: expected a number >= 0"),
        ({"temperature": True}, "temperature", "temperature = True: expected a number"),
        ({"max_tokens": 1.5}, "max_tokens", "max_tokens = 1.5: expected a whole number"),
        ({"max_tokens": -1}, "max_tokens", "expected a whole number with 0 <= x"),
        ({"max_tokens": 10**6}, "max_tokens", "expected at most 32768"),
        ({"max_tokens": 32768, "n": 100}, "max_tokens", "send smaller requests"),
        ({"min_tokens": 17}, "min_tokens", "expected at most max_tokens, which is 16"),
        ({"top_p": 0}, "top_p", "expected a number with 0 < x <= 1"),
        ({"top_k": 0}, "top_k", "expected a whole number with 1 <= x"),
        ({"logprobs": 101}, "logprobs", "expected a whole number"),
        ({"seed": -1}, "seed", "expected a whole number with 0 <= x < 2"),
        ({"seed": 2**63}, "seed", "expected a whole number with 0 <= x < 2"),
        ({"n": 0}, "n", "n = 0: expected a whole number with 1 <= x"),
        ({"n": MAX_SAMPLES + 1}, "n", "129 samples"),
        ({"n": 2, "best_of": 3}, "best_of", "not supported"),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"logit_bias": {"50256": -100}}, "logit_bias", "not supported"),
        ({"stop": ""}, "stop", "texts of 1 to 200 characters"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 texts"),
        ({"stop": [1]}, "stop", "expected a list of texts"),
        ({"echo": "yes"}, "echo", "expected true or false"),
        ({"stream": 1}, "stream", "expected true or false"),
        ({"stream_options": True}, "stream_options", "expected an object"),
        ({"prompt": 5}, "prompt", "expected a text, a list of token ids, or a list of these"),
        ({"prompt": []}, "prompt", "expected a text, a list of token ids"),
        ({"prompt": [[]]}, "prompt", r"prompt\[0\] = .*at least one token id"),
        ({"prompt": [1, 257]}, "prompt", r"prompt\[1\] = 257: expected a token id, 0 to 256"),
        ({"prompt": [1, True]}, "prompt", r"prompt\[1\] = True"),
        ({"prompt": [[1], [2, -1]]}, "prompt", r"prompt\[1\]\[1\] = -1"),
        ({"prompt": ["a", 1]}, "prompt", r"prompt\[1\] = 1: expected a text"),
        ({"prompt": ["a"] * 129}, "prompt", "129 prompts"),
        ({"prompt": "a\ud800"}, "prompt", "surrogate"),
        ({"prompt": "a" * 33, "echo": True, "logprobs": 1}, "prompt", "at most 32, the context length"),
        ({"prompt": "a" * (MAX_PROMPT_TOKENS // 4), "n": 8}, "prompt", "tokens in total, times n"),
    ],
)
def test_errors_of_requests(url, body, param, message):
    status, _, content = ask(url, "POST", body=body)
    assert status == 400
    assert content.keys() == {"error"}
    assert content["error"] == {
        "message": content["error"]["message"],
        "type": "invalid_request_error",
        "param": param,
        "code": None,
    }
    assert re.search(message, content["error"]["message"])
    assert len(content["error"]["message"]) < 500


def test_errors_of_routes_and_health(url):
    for method, path, status, message in [
        ("GET", "/nothing", 404, "GET '/nothing': not found; the routes are GET /, /health"),
        ("GET", "/v1/completions", 405, "method not allowed"),
        ("GET", "/../../etc/passwd", 404, "not found"),
        ("POST", "/", 405, "method not allowed"),
    ]:
        found, _, content = ask(url, method, path)
        assert found == status
        assert message in content["error"]["message"]
    for path in ("/v1/completions", "/tokenize", "/detokenize"):
        status, _, content = ask(url, "POST", path, body=b" " * (MAX_BODY + 1))
        assert (status, content["error"]["message"]) == (413, f"the body is larger than {MAX_BODY} bytes")
        assert ask(url, "GET", path)[0] == 405
    status, _, content = ask(url, "GET", "/health")
    assert (status, content) == (200, {"status": "ok", "model": "notes", "requests": 0})


@settings(max_examples=300, deadline=None)
@given(
    st.binary(max_size=40)
    | st.dictionaries(
        st.sampled_from([*completions.SAMPLING_FIELDS, *completions.OTHER_FIELDS]),
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=5)
            | st.sampled_from(["notes", 1, 0.5]),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
            max_leaves=5,
        ),
        max_size=4,
    )
)
def test_any_body_is_parsed_or_refused(body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        request = parse_request(data, SERVED)
    except RequestError as error:
        json.dumps(error.to_dict()).encode()  # raises if it is not serializable
    else:
        assert request.prompts
        assert all(prompt.ids for prompt in request.prompts)


def test_errors_of_the_model_are_status_500():
    broken = GPT(MODEL.config, seed=1).eval()
    with torch.no_grad():
        broken.embed.weight.fill_(torch.nan)
    with running(replace(SERVED, model=broken)) as (address, _):
        for body in ({}, {"stream": True}, {"prompt": "a", "echo": True, "logprobs": 1}):
            status, _, content = ask(address, "POST", body=body)
            assert (status, content["error"]["type"]) == (500, "server_error")
            assert "NaN or infinity" in content["error"]["message"]
        assert ask(address, "GET", "/health")[2]["requests"] == 0


def test_out_of_memory_gives_the_same_samples_or_a_clear_error(monkeypatch):
    prefill = GPT.prefill

    def fits(self, ids, lengths, cache, rows):
        if len(cache.host_lengths) > limit:
            raise torch.OutOfMemoryError("x")
        prefill(self, ids, lengths, cache, rows)

    def fail(*args):
        raise torch.OutOfMemoryError("x")

    with running() as (url, _):
        body = {"prompt": "Once", "n": 5, "seed": 4, "max_tokens": 12}
        expected = post(url, **body)["choices"]
        monkeypatch.setattr(GPT, "prefill", fits)
        limit = 2
        assert post(url, **body)["choices"] == expected
        limit = 0
        status, _, content = ask(url, "POST", body=body)
        assert status == 500
        assert content["error"]["message"].startswith("one sample needs more memory than is free; ")
        monkeypatch.setattr(completions, "log_probabilities", fail)
        status, _, content = ask(url, "POST", body=body | {"echo": True, "logprobs": 1})
        assert status == 503
        assert "send a shorter one, or leave out echo" in content["error"]["message"]
        limit = 10
        assert post(url, **body)["choices"] == expected


# ---- the queue


@contextmanager
def sent(url, body):
    """Sends a request; yields the open connection."""
    place = urlsplit(url)
    data = json.dumps(body).encode()
    with socket.create_connection((place.hostname, place.port), timeout=30) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        yield connection


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_disconnected_client_frees_the_model(url):
    def in_queue():
        return ask(url, "GET", "/health")[2]["requests"]

    for stream in (True, False):
        with sent(url, ENDLESS | {"stream": stream}) as connection:
            if stream:
                assert b"data: {" in connection.recv(4000) + connection.recv(4000)
            wait_for(lambda: in_queue() == 1)
            with sent(url, ENDLESS):
                wait_for(lambda: in_queue() == 2)
            wait_for(lambda: in_queue() == 1)  # while the first continues
        wait_for(lambda: in_queue() == 0)
        started = time.monotonic()
        post(url, prompt="a")
        assert time.monotonic() - started < 30


def test_requests_run_in_order_and_a_full_queue_refuses_more(monkeypatch):
    monkeypatch.setattr("server.queue.MAX_REQUESTS", 3)
    order = []

    def wait(name):
        post(address, prompt="a", seed=1)
        order.append(name)

    with running() as (address, queue):
        with sent(address, ENDLESS) as first:
            wait_for(lambda: len(queue.jobs) == 1)
            threads = [threading.Thread(target=wait, args=(name,)) for name in ("second", "third")]
            for count, thread in enumerate(threads, start=2):
                thread.start()
                wait_for(lambda count=count: len(queue.jobs) == count)
            status, headers, content = ask(address, "POST", body={})
            assert (status, headers["retry-after"], content["error"]["code"]) == (503, "1", "queue_full")
            assert "3 requests are waiting already" in content["error"]["message"]
            assert order == []
            first.shutdown(socket.SHUT_RDWR)
            for thread in threads:
                thread.join(20)
        assert order == ["second", "third"]
        assert ask(address, "POST", body={})[0] == 200


def test_shutdown_ends_streams_with_an_error():
    with running() as (address, queue), sent(address, ENDLESS | {"stream": True}) as connection:
        received = connection.recv(65536)  # it is running, so the other one has to wait
        with sent(address, ENDLESS) as other:
            wait_for(lambda: len(queue.jobs) == 2)
            queue.close()
            while (part := connection.recv(65536)) and not part.endswith(b"0\r\n\r\n"):  # the last chunk
                received += part
            received += part
            assert b"the server is shutting down" in received
            assert b"[DONE]" not in received
            assert b"503" in other.recv(1000)
        assert ask(address, "POST", body={})[0] == 503


# ---- access control


def test_foreign_host_and_origin_are_refused(url):
    own = urlsplit(url).netloc
    port = own.partition(":")[2]
    for host in (own, f"localhost:{port}", "LOCALHOST", f"[::1]:{port}"):
        assert ask(url, "GET", "/v1/models", headers={"Host": host})[0] == 200
    for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[", "localhost@evil.example"):
        status, _, content = ask(url, "GET", "/v1/models", headers={"Host": host})
        assert status == 403
        assert "not a name of this machine" in content["error"]["message"]
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"http://localhost:{port}"):
        status, headers, content = ask(url, "POST", body={}, headers={"Origin": origin})
        assert status == 403
        assert "another web page" in content["error"]["message"]
        assert "access-control-allow-origin" not in headers
    assert ask(url, "POST", body={}, headers={"Origin": url})[0] == 200
    assert (
        ask(url, "OPTIONS", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})[0]
        == 403
    )


def test_the_token_is_required_for_all_but_the_page():
    options = ServerOptions(serve=True, host="0.0.0.0", port=0, api_token="a-long-secret")
    with running(options=options) as (address, _):
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/health"),
            ("POST", "/v1/completions"),
            ("GET", "/tokenizer_info"),
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
            ("GET", "/nothing"),
            ("POST", "/"),
        ):
            for given in (None, "Bearer wrong", "a-long-secret", "Bearer a-long-secret2", "Bearer \xe9"):
                status, headers, content = ask(
                    address, method, path, headers={} if given is None else {"Authorization": given}
                )
                assert (status, headers["www-authenticate"], content["error"]["code"]) == (
                    401,
                    "Bearer",
                    "invalid_api_key",
                )
                assert "a-long-secret" not in content["error"]["message"]
        assert ask(address, "GET", "/", headers={"Host": "any.example"})[0] == 200
        with openai.OpenAI(base_url=f"{address}/v1", api_key="a-long-secret", max_retries=0) as client:
            assert client.completions.create(model="notes", prompt="a").choices
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="other", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--serve", "--host=0.0.0.0"], "--host=0.0.0.0 lets other machines connect.*--api_token=TOKEN"),
        (["--serve", "--host=::"], "lets other machines"),
        (["--serve", "--host=my-machine"], "lets other machines"),
        (["--serve", "--host="], "lets other machines"),
        (["--serve", "--api_token=short"], "--api_token must have at least 8 characters"),
        (["--serve", "--api_token=with a space"], "no spaces"),
        (["--serve", "--port=65536"], "--port=65536: expected a whole number"),
        (["--serve", "--interactive=true"], "remove --interactive, --inspect, --prompts and --output"),
        (["--serve", "--output=jsonl"], "remove --interactive, --inspect, --prompts and --output"),
    ],
)
def test_invalid_flags(flags, message):
    with pytest.raises(UserError, match=message):
        sample.main(flags)


def test_loopback_addresses_need_no_token():
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert config.load("sample.py", ["--serve", f"--host={host}"]).section(ServerOptions).is_local


def test_a_port_in_use_and_a_foreign_host():
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match=r"--port=\d+: cannot listen there.*--port=0"),
    ):
        listen(ServerOptions(port=taken.getsockname()[1]))
    with pytest.raises(UserError, match="cannot listen there"):
        listen(ServerOptions(host="203.0.113.1", api_token="a-long-secret"))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "server.app")
    with pytest.raises(
        UserError, match="--serve needs the package uvicorn, which is not installed: pip install starlette uvicorn"
    ):
        importlib.import_module("server.app")


# ---- the page and the process


def test_the_page_is_one_file_and_its_policy_allows_no_other_host(url):
    status, headers, page = ask(url, "GET", "/")
    assert status == 200
    assert page == PAGE.read_bytes()
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert set(re.findall(rb"https?://[^\s'\"]+", page)) <= {b"http://www.w3.org/2000/svg"}
    assert not re.search(rb"<(script|link|img|iframe)[^>]+(src|href)=[\"'](?!data:)", page)
    assert ask(url, "HEAD", "/")[0] == 200


def test_the_pages_initial_settings_are_the_flags_of_sample_py(url):
    start = ask(url, "GET", "/v1/models/notes")[2]["start"]
    expected = {"prompt": "Once", "n": 2, "max_tokens": 50, "temperature": 0.7, "top_p": None, "stop": ["\n"]}
    assert {name: start[name] for name in expected} == expected


def test_sample_py_passes_its_flags_to_serve(tmp_path, monkeypatch):
    save(tmp_path / "notes", 1, TOKENIZER)
    calls = []
    monkeypatch.setattr("server.app.serve", lambda *args: calls.append(args) or 0)
    for flags in (["--prompt=x", "--num_samples=3", "--seed=7", "--min_p=0.1"], []):
        assert sample.main([f"--run={tmp_path / 'notes'}", "--serve", *flags]) == 0
    (_, _, name, sampling, _, page_defaults, novelty), (*_, defaults_without_flags, _) = calls
    assert (name, sampling.min_p, page_defaults) == ("notes", 0.1, {"prompt": "x", "n": 3, "seed": 7})
    assert defaults_without_flags == {"prompt": "", "n": 1, "seed": None}
    assert novelty is None


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_stops_the_server_at_once_with_exit_code_0(tmp_path):
    save(tmp_path / "runs" / "mine", 1, TOKENIZER)
    command = [sys.executable, sample.__file__, "--run=runs/mine", "--serve", "--port=0", "--threads=1"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, text=True)
    lines = iter(child.stderr.readline, "")
    address = next(found[1] for line in lines if (found := re.search(r"serving mine at (http://127.0.0.1:\d+) ", line)))
    assert ask(address, "GET", "/v1/models/mine")[0] == 200
    with ExitStack() as connections:
        streaming = connections.enter_context(sent(address, ENDLESS | {"stream": True}))
        assert streaming.recv(100)  # it is running, so the other one has to wait
        connections.enter_context(sent(address, ENDLESS))
        silent = connections.enter_context(socket.create_connection(streaming.getpeername()))
        silent.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=20)
    assert (child.returncode, out, err) == (0, "", "")
