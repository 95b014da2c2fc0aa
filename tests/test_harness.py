"""lm-evaluation-harness against the local server, without a copy of the tokenizer: it finds the model's numbers."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from string import ascii_letters

import pytest
import torch

from common.weights import export_weights
from interop import __main__ as interop
from model_folder import write_model_folder
from server.options import ServerOptions
from tests.test_server import EOS, SERVED, TOKENIZER, ending_model, greedy_end, ids_of, running

PACKAGES = ("lm_eval", "aiohttp", "tenacity")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {MISSING}; pip install 'lm_eval[api]'"),
]
MAX_LENGTH = 32  # the model's block_size; of it the harness reads one id less, hf with max_length=M reads M + 1
PAIRS = "pairs", "loglikelihood", {"doc_to_text": "{{context}}", "doc_to_target": "{{continuation}}"}, "acc"
WHOLE = "whole", "loglikelihood_rolling", {"doc_to_text": "", "doc_to_target": "{{text}}"}, "bits_per_byte"


def harness(folder, kind, documents, backend, batch_size=1, **model_args):
    """Runs lm_eval offline on a task made of these documents. backend: its --model, such as local-completions or hf.

    Returns for each document of PAIRS, with `context` and `continuation`: (log-likelihood, whether it is greedy); of
    WHOLE, with `text`: the log-likelihood.
    """
    name, output_type, texts, metric = kind
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test",
        "output_type": output_type,
        "target_delimiter": "",
        "metric_list": [{"metric": metric}],
    }
    (folder / "task.yaml").write_text(json.dumps(task | texts))  # JSON is YAML
    args = {"--model": backend, "--tasks": name, "--include_path": folder, "--batch_size": batch_size}
    args |= {"--model_args": json.dumps(model_args), "--output_path": folder / "results"}
    flags = [str(part) for flag in args.items() for part in flag]
    command = [sys.executable, "-m", "lm_eval", "run", *flags, "--log_samples"]
    offline = {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    [found] = (folder / "results").rglob(f"samples_{name}_*.jsonl")
    samples = sorted(map(json.loads, found.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    assert [sample["doc"] for sample in samples] == documents
    if name == "whole":
        return [float(sample["filtered_resps"][0]) for sample in samples]
    answers = [sample["filtered_resps"][0] for sample in samples]
    return [(float(nats), greedy == "True") for nats, greedy in answers]


def score(model, ids, n):
    """The sum of the log-probabilities of the last n ids, and whether each is the likeliest one."""
    logprobs = model(torch.tensor([ids]))[0].log_softmax(-1)[-n - 1 : -1]
    targets = torch.tensor(ids[-n:])
    return logprobs[range(n), targets].sum().item(), torch.equal(logprobs.argmax(-1), targets)


def score_pair(model, context, continuation, *, starts_with_eos):
    """What the harness should find: it reads the last MAX_LENGTH - 1 ids, and EOS in place of an empty context."""
    kept = context.rstrip(" ")  # it moves spaces at the end to the continuation
    whole = TOKENIZER.encode(context + continuation).tolist()
    n = len(whole) - len(TOKENIZER.encode(kept))
    ids = whole[-(MAX_LENGTH - 1) :] if context else [EOS, *whole]
    return score(model, [EOS, *ids] if starts_with_eos and context else ids, n)


def greedy_pair(model, before):
    """A letter and the character that is the likeliest one after it (and after the ids `before`)."""
    best = {letter: model(torch.tensor([[*before, ord(letter)]]))[0, -1].argmax().item() for letter in ascii_letters}
    return next((letter, chr(id)) for letter, id in best.items() if 32 < id < 127)


def score_whole(model, text, n=MAX_LENGTH - 2):
    """The same of a text: windows of n targets, after EOS or the ids before, at least one."""
    ids = ids_of(text)
    ends = [*range(n + 1, len(ids), n), len(ids)]
    starts = [1, *ends]
    return sum(
        score(model, ids[max(0, end - n - 1) : end], end - start)[0] for start, end in zip(starts, ends, strict=False)
    )


@pytest.fixture(scope="module")
def model():
    return ending_model()


@pytest.fixture
def model_args(model, monkeypatch):
    """Of local-completions, for a server that requires a token."""
    monkeypatch.setenv("OPENAI_API_KEY", "a-long-secret")  # for the completions
    options = ServerOptions(serve=True, port=0, api_token="a-long-secret")
    with running(replace(SERVED, model=model), options) as (address, _):
        yield {
            "base_url": f"{address}/v1/completions",
            "model": "notes",
            "tokenizer_backend": "remote",
            "auth_token": "a-long-secret",  # for the tokenizer
            "max_length": MAX_LENGTH,
        }


@pytest.mark.parametrize(
    "more",
    [{"batch_size": 4}, {"num_concurrent": 3}, {"tokenized_requests": False}],
    ids=["ids", "concurrent", "texts"],
)
def test_log_likelihoods_are_those_of_the_model(model, model_args, more, tmp_path):
    as_texts = "tokenized_requests" in more  # the server then starts each with EOS
    before = [EOS] * as_texts
    ending, likely = greedy_end(model, before), greedy_pair(model, before)
    pairs = [
        ("Once upon", " a time"),
        ("", "Once"),
        ("Es wär ", "schön"),  # a space at the end, characters of two tokens
        likely,
        (ending[:1], ending[1:]),
        ("A context of more than thirty-two tokens, ", "cut"),
    ]
    documents = [{"context": context, "continuation": continuation} for context, continuation in pairs]
    found = harness(tmp_path / "a b", PAIRS, documents, "local-completions", **model_args | more)
    expected = [score_pair(model, *pair, starts_with_eos=as_texts) for pair in pairs]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in expected].count(True) in range(1, len(pairs)), "both should occur"


def test_whole_texts_are_scored_in_windows(model, model_args, tmp_path):
    texts = ["a short one", "one of several windows, " * 5, greedy_end(model, [EOS])]
    found = harness(tmp_path, WHOLE, [{"text": text} for text in texts], "local-completions", **model_args)
    assert found == pytest.approx([score_whole(model, text) for text in texts], abs=1e-4)


@pytest.mark.parametrize("kind", [PAIRS, WHOLE], ids=["pairs", "whole"])
def test_the_exported_model_gets_the_same_numbers(model, model_args, kind, tmp_path):
    """lm_eval's own Hugging Face model on the exported folder, in windows as long as the server's."""
    pytest.importorskip("transformers")
    tensors, config = export_weights(model), model.config.to_dict()
    write_model_folder(tmp_path / "m", tensors, config, TOKENIZER.to_dict(), {})
    assert interop.main(["export", str(tmp_path / "m"), "--to=hf", f"--out={tmp_path / 'exported'}"]) == 0
    texts = ["a short one", "one of several windows, " * 5, "Es wär schön"]
    pairs = [("Once upon", " a time"), ("", "Once"), greedy_pair(model, []), ("A long context, " * 3, "cut")]
    documents = [{"context": context, "continuation": continuation} for context, continuation in pairs]
    documents = documents if kind is PAIRS else [{"text": text} for text in texts]
    served = harness(tmp_path / "one", kind, documents, "local-completions", **model_args)
    own = harness(
        tmp_path / "other", kind, documents, "hf", pretrained=str(tmp_path / "exported"), max_length=MAX_LENGTH - 2,
        dtype="float32", add_bos_token=False,
    )  # fmt: skip
    if kind is WHOLE:
        assert own == pytest.approx(served, abs=1e-3)
        return
    assert [nats for nats, _ in own] == pytest.approx([nats for nats, _ in served], abs=1e-3)
    assert [greedy for _, greedy in own] == [greedy for _, greedy in served]
