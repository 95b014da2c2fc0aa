"""A stored model is believed as far as its weights bear it out; files of JSON, headers of tensors and options typed by
hand have limits. Each crafted input ends in one clear error, at once, and without the memory that it asks for.
"""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import config
import model_folder
import sample
import train
from common.weights import export_weights, weight_count
from errors import UserError
from files import DamagedFile, parse_json, read_json
from interop.__main__ import main as interop
from model import GPT, GPTConfig
from tensor_files import MAX_HEADER, MAX_TENSORS, read_header
from tests import fuzz_models
from tests.conftest import ROOT
from tests.timing import least_seconds

CONFIGS = [  # model, changes, what the error says
    ("gpt2", {"n_layer": 10**9}, "n_layer=1000000000: expected a whole number with 1 <= x <= 512"),
    ("gpt2", {"n_layer": 512}, "n_layer=512: the weights have 2 layers"),
    ("gpt2", {"n_layer": 3}, "n_layer=3: the weights have 2 layers"),
    ("gpt2", {"n_layer": 1}, "n_layer=1: the weights have 2 layers"),
    ("gpt2", {"n_layer": 0}, "n_layer=0"),
    ("gpt2", {"n_layer": "2"}, "n_layer='2'"),
    ("gpt2", {"n_layer": True}, "n_layer=True"),
    ("gpt2", {"n_layer": 2.5}, "n_layer=2.5"),
    ("gpt2", {"n_layer": None}, "n_layer=None"),
    ("gpt2", {"n_layer": [2]}, r"n_layer=\[2\]"),
    ("gpt2", {"n_layer": 10**200}, "n_layer=1000"),
    ("gpt2", {"n_embd": 2**17}, "n_embd=131072: expected a whole number with 1 <= x <= 65536"),
    ("gpt2", {"n_embd": 65_536}, r"n_embd.*has the shape \(257, 16\), this model has \(257, 65536\)"),
    ("gpt2", {"n_embd": 17}, "n_embd=17 is not divisible by n_head=2"),
    ("gpt2", {"n_hidden": -4}, "n_hidden=-4"),
    ("gpt2", {"n_hidden": 2**20}, "mlp, bias, n_hidden, n_embd: 'blocks.0.mlp.up.weight' has the shape"),
    ("gpt2", {"n_head": 4, "head_dim": 8}, "n_head, n_kv_head, head_dim, n_embd: 'blocks.0.attn.qkv.weight'"),
    ("gpt2", {"n_head": 0}, "n_head=0"),
    ("gpt2", {"n_kv_head": 3}, "n_head=2 is not divisible by n_kv_head=3"),
    ("gpt2", {"n_kv_head": 1}, "'blocks.0.attn.qkv.weight' has the shape"),
    ("gpt2", {"head_dim": 10**9}, "head_dim=1000000000"),
    ("gpt2", {"block_size": 10**9}, "block_size=1000000000"),
    ("gpt2", {"block_size": 2**24}, "positions, block_size, n_embd: 'position.weight' has the shape"),
    ("modern", {"block_size": 2**24}, "block_size=16777216 is too long for so small a model"),
    ("paper", {"block_size": 2**24}, "block_size=16777216 is too long for so small a model"),
    ("gpt2", {"positions": "rotary"}, "the weights hold 'position.weight'"),
    ("gpt2", {"positions": "alibi"}, "positions='alibi': expected learned, sinusoidal or rotary"),
    ("modern", {"rope_theta": 0}, "rope_theta=0"),
    ("modern", {"rope_theta": -1e4}, "rope_theta=-10000"),
    ("modern", {"rope_theta": 1e300}, "rope_theta=1e"),
    ("modern", {"rope_factor": 0.5}, "rope_factor=0.5"),
    ("modern", {"rope_original_context": 2**40}, "rope_original_context="),
    ("modern", {"norm_eps": 0}, "norm_eps=0"),
    ("modern", {"norm_eps": 1e9}, "norm_eps=1"),
    ("modern", {"qk_norm": False}, "qk_norm.*the weights hold 'blocks.0.attn.k_norm.weight'"),
    ("modern", {"qk_norm": 1}, "qk_norm=1: expected true or false"),
    ("modern", {"tie_embeddings": True}, "tie_embeddings.*the weights hold 'head.weight'"),
    ("gpt2", {"tie_embeddings": False}, "tie_embeddings.*the weights lack 'head.weight'"),
    ("gpt2", {"bias": False}, "bias.*the weights hold"),
    ("gpt2", {"mlp": "swiglu"}, "'blocks.0.mlp.up.weight' has the shape"),
    ("gpt2", {"norm_position": "post"}, "norm_position.*the weights hold 'final_norm"),
    ("gpt2", {"dropout": 7.5}, "dropout=7.5: expected a number with 0 <= x < 1"),
    ("gpt2", {"dropout": -0.1}, "dropout=-0.1"),
    ("n-grams", {"max_ngram": 10**9}, "max_ngram=1000000000"),
    ("n-grams", {"max_ngram": 1}, "the weights hold 'ngrams.weight'"),
    ("n-grams", {"ngram_rows": 2**30}, r"ngram_rows.*this model has \(1073741824, 16\)"),
    ("n-grams", {"rotary_dim": 2**16}, "rotary_dim=65536 is odd, or above the head size"),
    ("n-grams", {"rotary_dim": 3}, "rotary_dim=3 is odd"),
    ("n-grams", {"sliding_window": 0}, "sliding_window=0"),
    ("n-grams", {"sliding_window": 2**40}, "sliding_window="),
    ("gpt2", {"vocab_size": 10**12}, "vocab_size=1000000000000"),
    ("gpt2", {"vocab_size": 258}, r"vocab_size: 'embed.weight' has the shape \(257, 16\)"),
    ("gpt2", {"vocab_size": 0}, "vocab_size=0"),
    ("gpt2", {"eos_id": -1}, "eos_id=-1"),
    ("gpt2", {"eos_id": 10**6}, "eos_id=1000000 lies outside the vocabulary"),
    ("gpt2", {"n_layers": 2}, r"unknown options \['n_layers'\]"),
    ("gpt2", {"adapter": {"rank": 10**9, "scale": 1.0, "base": {"bytes": 1, "crc32": 1}}}, "adapter"),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model folders of runs, by name."""
    home = tmp_path_factory.mktemp("hostile models")
    return {name: fuzz_models.make_run(home / name, name) for name in fuzz_models.MODELS}


def copied(folder: Path, home: Path, alone: bool) -> Path:
    """A copy: of the checkpoint, or of the model folder alone."""
    source, target = (
        (folder, home / "alone") if alone else (folder.parent, home / "run/checkpoints" / folder.parent.name)
    )
    shutil.copytree(source, target)
    return target if alone else target / "model"


def craft(folder: Path, changes: dict) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    if (folder.parent / "manifest.json").exists():
        fuzz_models.sign(folder.parent)


def message(main, *argv: str) -> str:
    with pytest.raises(UserError) as error:
        main([*argv])
    return str(error.value)


# ---- configs


@pytest.mark.parametrize("alone", [False, True], ids=["checkpoint", "folder"])
@pytest.mark.parametrize(("name", "changes", "expected"), CONFIGS)
def test_a_config_that_the_weights_do_not_bear_out_is_one_error(folders, tmp_path, name, changes, expected, alone):
    folder = copied(folders[name], tmp_path, alone)
    craft(folder, changes)
    said = ""

    def start() -> None:
        nonlocal said
        said = message(sample.main, f"--run={folder}", "--max_new_tokens=2", "--device=cpu")

    assert least_seconds(start, 1) < 1
    assert "config.json" in said or "holds adapters, without the weights" in said
    assert re.search(expected, said)


@pytest.mark.parametrize("changes", [{"n_layer": 10**9}, {"block_size": 2**24}, {"n_hidden": -4}, {"dropout": 7.5}])
@pytest.mark.parametrize("reader", ["score", "inspect", "serve", "export", "export model", "init_from", "teacher"])
def test_every_reader_of_a_model_refuses_it(folders, tmp_path, monkeypatch, changes, reader):
    folder = copied(folders["modern"], tmp_path, True)
    craft(folder, changes)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("Anna sees a cat. " * 400)
    run, debug = f"--run={folder}", ["debug", "--data=text.txt", "--max_steps=1"]
    main, *argv = {
        "score": (sample.main, run, "--score=text.txt"),
        "inspect": (sample.main, run, "--inspect=out.html"),
        "serve": (sample.main, run, "--serve", "--port=0"),
        "export": (interop, "export", str(folder), "--to=hf"),
        "export model": (interop, "export", str(folder), "--to=model"),
        "init_from": (train.main, *debug, f"--init_from={folder}"),
        "teacher": (train.main, *debug, f"--teacher={folder}"),
    }[reader]
    said = message(main, *argv)
    assert "config.json" in said
    assert f"{next(iter(changes))}=" in said


def test_a_resumed_run_refuses_it(folders, tmp_path):
    folder = copied(folders["modern"], tmp_path, False)
    craft(folder, {"n_layer": 400})
    assert "n_layer=400: the weights have 2 layers" in message(train.main, f"--resume={folder.parents[2]}")


@pytest.mark.parametrize("changes", [{"n_layer": 10**9}, {"block_size": 10**9}, {"ngram_rows": 2**31 - 1}, {}])
def test_a_crafted_config_takes_no_more_than_the_model_itself(folders, tmp_path, changes):
    """As a user starts it: beside the same command on the folder as it was."""
    folder = copied(folders["n-grams"], tmp_path, True)
    seconds, megabytes, code = usage(folder, tmp_path)
    assert code == 0
    craft(folder, changes or {"block_size": 2**20})  # that long a table is allowed; the cache is as long as the text
    for _ in range(3):  # another program on the machine may slow one down
        crafted_seconds, crafted_megabytes, code = usage(folder, tmp_path)
        if crafted_seconds < seconds + 1:
            break
    assert code == (2 if changes else 0)
    assert crafted_seconds < seconds + 1
    assert crafted_megabytes < megabytes + 80


def usage(folder: Path, home: Path) -> tuple[float, float, int]:
    """Processor seconds, peak megabytes and exit code of sample.py."""
    code = (
        "import resource, subprocess, sys; child = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL,"
        " stderr=subprocess.PIPE); used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        " assert b'Traceback' not in child.stderr;"
        " print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1e3, child.returncode)"
    )
    command = [sys.executable, str(ROOT / "sample.py"), f"--run={folder}", "--max_new_tokens=2", "--device=cpu"]
    made = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=home, check=True)
    seconds, megabytes, status = map(float, made.stdout.split())
    return seconds, megabytes, int(status)


def test_presets_and_large_published_models_are_in_range():
    shapes = {"n_layer": 126, "n_head": 128, "n_kv_head": 8, "n_embd": 16_384, "n_hidden": 53_248}  # Llama 3.1 405B
    modern = {"positions": "rotary", "norm": "rmsnorm", "mlp": "swiglu", "bias": False, "tie_embeddings": False}
    large = GPTConfig(**shapes, **modern, block_size=131_072, vocab_size=128_256, rope_theta=5e5, rope_factor=8.0)
    assert weight_count(large) == pytest.approx(405.8e9, rel=1e-3)
    GPTConfig(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, n_hidden=8192, **modern, block_size=131_072)
    long = {"n_layer": 28, "n_head": 28, "n_kv_head": 4, "n_embd": 3584, "n_hidden": 18_944}  # Qwen2.5 7B 1M
    GPTConfig(**long, **modern, block_size=1_010_000, rope_theta=1e7)
    for config_ in fuzz_models.MODELS.values():
        found = sum(tensor.numel() for tensor in export_weights(GPT(config_)).values() if tensor.ndim > 1)
        assert weight_count(config_) == found


# ---- files


def with_header(path: Path, content: dict, data: bytes = b"", length: int | None = None) -> Path:
    encoded = json.dumps(content).encode()
    path.write_bytes((len(encoded) if length is None else length).to_bytes(8, "little") + encoded + data)
    return path


@pytest.mark.parametrize("count", [MAX_TENSORS + 1, 200_000])
def test_a_header_of_many_empty_tensors(folders, tmp_path, count):
    folder = copied(folders["gpt2"], tmp_path, True)
    entry = {"dtype": "I8", "shape": [0], "data_offsets": [0, 0]}
    with_header(folder / "model.safetensors", {f"e{i}": entry for i in range(count)})
    assert f"{count:,} tensors; Sprout writes at most" in message(sample.main, f"--run={folder}")


@pytest.mark.parametrize("length", [0, MAX_HEADER + 1, 10**8, 2**63, 2**64 - 1])
def test_a_header_of_impossible_length(tmp_path, length):
    path = with_header(tmp_path / "model.safetensors", {}, length=length)
    os.truncate(path, 2 * 10**8)  # sparse
    with pytest.raises(DamagedFile, match="its header length of"):
        read_header(path)


CHECKED = ["model/config.json", "model/sprout_tokenizer.json", "model/model.safetensors", "state.json"]


@pytest.mark.parametrize("is_crafted", [False, True], ids=["damaged", "crafted"])
@pytest.mark.parametrize("name", [*CHECKED, "manifest.json"])
def test_sparse_files_of_thirty_gigabytes_are_not_read(folders, tmp_path, monkeypatch, name, is_crafted):
    """Neither where the manifest tells their size, nor where it was made for them."""
    folder, size = copied(folders["gpt2"], tmp_path, False), 30 * 10**9
    manifest = json.loads((folder.parent / "manifest.json").read_bytes())
    os.truncate(folder.parent / name, size)
    if is_crafted and name != "manifest.json":
        manifest["files"][name] = {"bytes": size, "crc32": 0}
        fuzz_models.write_manifest(folder.parent, manifest)
    real = model_folder.size_and_crc
    monkeypatch.setattr(model_folder, "size_and_crc", lambda path: real(path) if path.stat().st_size < size else None)
    expected = "30000000000 bytes|file not fully covered"
    assert re.search(expected, message(sample.main, f"--run={folder}"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(DamagedFile, match="expected a regular file"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["big.json", "big.py"])
def test_presets_of_any_size_are_not_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    os.truncate(name, 30 * 10**9)
    assert "the maximum is" in message(train.main, name)


def test_the_tokenizer_of_a_large_vocabulary_is_read():
    """As many tokens and merges as Llama 3's tokenizer.json has, in its newer form."""
    vocab = {f"token {i}": i for i in range(128_000)}
    merges = [[f"tok{i}", "en"] for i in range(280_000)]
    text = json.dumps({"model": {"vocab": vocab, "merges": merges}}).encode()
    from files import TOKENIZER_SPARE

    assert len(parse_json(text, TOKENIZER_SPARE)["model"]["merges"]) == 280_000


# ---- options


def test_every_whole_number_has_both_bounds():
    """The mechanism behind the table below."""
    for option in config._loader.options.values():
        if int in option.kinds and float not in option.kinds:
            bounds = option.interval
            assert bounds.le is not None or bounds.lt is not None, f"{option.name} has no upper bound"
            assert bounds.ge is not None or bounds.gt is not None, f"{option.name} has no lower bound"


WRONG = {
    "train.py": [
        "--n_layer=1e9", "--n_embd=131072000", "--n_hidden=-4", "--block_size=1e9", "--threads=1e9",
        "--final_samples=1e9", "--sample_tokens=1e18", "--tokens_per_step=1e18", "--micro_batch_size=1e18",
        "--max_steps=1e18", "--muon_steps=1e9", "--max_ngram=1e9", "--ngram_rows=1e12", "--vocab_size=1e12",
        "--lora_rank=1e9", "--patience=1e18", "--encoding=utf-7", "--encoding=UTF7", "--encoding=rot13",
        "--encoding=base64", "--encoding=idna", "--encoding=punycode", "--encoding=unicode_escape",
        "--encoding=raw_unicode_escape", "--encoding=undefined", "--encoding=hex", "--wandb_project=a\udcff",
        "--head_dim=1e9", "--rope_theta=0", "--norm_eps=0", "--dropout=7.5", "--seed=1e19",
    ],
    "sample.py": [
        "--num_samples=1e12", "--max_new_tokens=1e12", "--top_k=1e18", "--keep_head=1e18", "--threads=1e9",
        "--novelty_words=1e9", "--eval_stride=1e12", "--logprobs=1e9", "--port=1e9", "--prompt=a\udcff",
        "--stop=a\udcff", "--checkpoint=\udcff",
    ],
    "prepare_data": ["--shard_tokens=1e12", "--vocab_size=1e12", "--encoding=utf-7", "--name=a\0b", "--val_fraction=1"],
}  # fmt: skip
PATHS = {
    "train.py": ["run", "data", "resume", "init_from", "teacher", "tokenizer", "data_dir"],
    "sample.py": ["run", "data", "prompt_file", "prompts", "inspect", "score"],
    "prepare_data": ["input", "out", "tokenizer", "data_dir"],
}
FLAGS = [(script, flag) for script, flags in WRONG.items() for flag in flags] + [
    (script, f"--{name}={text}")
    for script, names in PATHS.items()
    for name, text in itertools.product(names, ["n" * 256, "é" * 128, "a/" * 2100, "a\0b", "\ud800"])
]


@pytest.mark.parametrize(("script", "flag"), FLAGS, ids=lambda value: repr(value[:30]))
def test_options_beyond_what_machines_have_are_one_error(script, flag):
    said = ""

    def load() -> None:
        nonlocal said
        said = message(partial(config.load, script), flag)

    assert least_seconds(load, 0.5) < 0.5
    assert flag.partition("=")[0].lstrip("-") in said
    assert len(said.splitlines()) <= 3


def test_every_path_is_in_the_table():
    for script, names in PATHS.items():
        declared = {name for name, option in config._loader.own(script).items() if option.path}
        assert declared == set(names)


def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("Anna sees a cat. " * 400)
    flags = ["debug", "--data=text.txt", "--max_steps=1", "--n_embd=65536", "--n_layer=200", "--device=cpu"]
    assert "GB of memory" in message(train.main, *flags)


@pytest.mark.parametrize("arguments", [["--n_layer=1e9"], ["--run=" + "n" * 300], ["n" * 300 + ".json"]])
def test_as_typed(tmp_path, arguments):
    made = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    assert (made.returncode, made.stdout) == (2, "")
    assert made.stderr.startswith("error: ")
    assert "Traceback" not in made.stderr


def test_the_cache_is_as_long_as_the_text(folders, monkeypatch):
    """And not as the context of the model, which no weight of a rotary model bears out."""
    from generation import batch
    from generation.text import load_model, sample_texts

    model, tokenizer = load_model(folders["modern"], torch.device("cpu"))
    made, cache = list[int](), batch.KVCache
    monkeypatch.setattr(
        batch, "KVCache", lambda config_, *args: made.append(config_.block_size) or cache(config_, *args)
    )
    settings_ = {"num_samples": 2, "temperature": 1.0, "seed": 1}
    sample_texts(model, tokenizer, "abc", max_new_tokens=5, **settings_)
    sample_texts(model, tokenizer, "abc", max_new_tokens=50, **settings_)
    assert made == [9, 32]  # end-of-sequence, three bytes, five new ones; the model's context


# ---- anything


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(sorted(fuzz_models.MODELS)),
    st.dictionaries(
        st.sampled_from(sorted(GPTConfig().to_dict())),
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.lists(st.integers()),
        min_size=1, max_size=2,
    ),
)  # fmt: skip
def test_any_values_are_success_or_one_error(folders, tmp_path, name, changes):
    folder = tmp_path / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(folders[name], folder)
    craft(folder, changes)
    try:
        sample.main([f"--run={folder}", "--max_new_tokens=1", "--device=cpu"])
    except UserError as error:
        assert str(folder) in str(error) or "--keep_head" in str(error)  # noqa: PT017 - any values may be either


def test_drawn_examples():
    """`make torture` tries more of them."""
    assert fuzz_models.run(150, seed=1) == []
