"""Every command of README.md exits with 0, run in the README's order with a tiny text and two steps."""

import importlib.util
import io
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

import interop.__main__ as interop
import sample as sample_script
import train as train_script
from common.tokenizer import bytes_tokenizer
from prepare_data.__main__ import main as prepare_main
from tests.test_import import nanogpt_checkpoint, write_llama
from training.report import main as report_main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
LINES = [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
COMMANDS = [command for line in LINES if (command := line.split("  #")[0].strip())]
TORCHRUN_COMMANDS = re.findall(r"^(?:srun )?(torchrun .*)$", README.replace("\\\n", " "), re.MULTILINE)
PYTHON_COMMANDS = [
    command for command in COMMANDS if command.startswith(("python ", "torchrun "))
]  # others set up the environment
SMALL = ["--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=16"]
SMALL += ["--tokens_per_step=64", "--budget_minutes=none", "--warmup_steps=1"]
QUICK = [
    "--max_steps=2",
    "--patience=none",
    "--eval_tokens=300",
    "--sample_tokens=3",
    "--final_samples=1",
    "--threads=1",
]


@pytest.fixture
def _files_of_the_readme(tmp_path, monkeypatch, small_text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("server.app.Server.run", lambda server, sockets: None)  # which would not return
    monkeypatch.setattr("training.tries.START_SECONDS", 0.0)  # the text is too short for --try otherwise
    monkeypatch.setattr("training.tries.MIN_STEPS", 1)
    text = small_text.read_text("utf-8")
    Path("my_novel.txt").write_text(text, encoding="utf-8")
    Path("letters.txt").write_text(text[:20_000], encoding="utf-8")
    names = [line.split()[0] + str(i) for i, line in enumerate(text.splitlines())]
    Path("names.txt").write_text("\n".join(names), encoding="utf-8")
    Path("prompt.txt").write_text("Anna sees", encoding="utf-8")
    Path("many.jsonl").write_text('"Anna"\n{"prompt": "Once", "id": 7}\n', encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("Anna sees\n/retry\n"))  # for --interactive
    for name in ("SmolLM2-135M", "hub/gpt2"):
        write_llama(Path(name))
    monkeypatch.setattr("interop.hub.fetch", lambda name, pickle: Path("hub", name))
    nanogpt_checkpoint(Path("ckpt.pt"), 50_257)
    monkeypatch.setattr(
        "interop.nanogpt_source.named_tokenizer", lambda name: bytes_tokenizer()
    )  # GPT-2's is a download
    Path("more").mkdir()
    Path("more", "one.txt").write_text("Anna sees the moon.", encoding="utf-8")
    Path("folder").mkdir()
    for part in range(30):
        Path("folder", f"{part}.txt").write_text(text[2000 * part : 2000 * part + 2000], encoding="utf-8")


def run_train(args: list[str]) -> int:
    """The command with a small model and few steps; the shape of a resumed or initial model is given."""
    resume, init_from = (any(arg.startswith(flag) for arg in args) for flag in ("--resume", "--init_from"))
    if resume or init_from:
        args = ["--budget_minutes=0.01" if "budget_minutes" in arg else arg for arg in args] + ["--threads=1"]
        if not any("max_steps" in arg or "budget_minutes" in arg for arg in args):
            args += ["--max_steps=3"]
    elif any(arg.startswith("--try") for arg in args):
        args += ["--plan"]
    else:
        args += QUICK + SMALL
    if init_from:
        args += ["--tokens_per_step=64", "--budget_minutes=none", "--eval_tokens=300", "--sample_tokens=3"]
        args += ["--max_steps=3"] * (not any("max_steps" in arg for arg in args))
    if not resume and not any(arg.startswith("--data") for arg in args):
        args += ["--data=my_novel.txt"]
    return train_script.main(args)


def run_command(command: str) -> int:
    """Runs a command of the README in this process, with flags that make it quick."""
    if command.startswith("torchrun "):  # that it starts processes is tested in test_parallel.py
        command = "python " + command.partition(" -- ")[2] + " --tokenizer=bytes" * ("--resume" not in command)
    script, *args = shlex.split(command.partition(" > ")[0])[1:]
    if script == "train.py":
        return run_train(args)
    if script == "sample.py":
        args += ["--port=0"] if "--serve" in args else []
        args += [] if any(arg.startswith("--score") for arg in args) else ["--max_new_tokens=5"]
        return sample_script.main([*args, "--threads=1"])
    module, *args = args
    assert script == "-m", command
    if "--to=gguf" in args and importlib.util.find_spec("gguf") is None:
        return 0  # requirements-interop.txt
    mains = {"prepare_data": prepare_main, "training.report": report_main, "interop": interop.main}
    return mains[module](args) or 0


@pytest.mark.usefixtures("_files_of_the_readme")
def test_every_command_runs(capsys):
    assert len(PYTHON_COMMANDS) > 20
    for command in PYTHON_COMMANDS:
        if command.endswith("--help"):
            with pytest.raises(SystemExit) as exited:
                run_command(command)
            assert exited.value.code == 0
        else:
            assert run_command(command) == 0, command


def test_every_command_is_known():
    allowed = ("python ", "torchrun ", "make ", "python3 -m venv", ".venv/bin/python ")
    assert all(command.startswith(allowed) for command in COMMANDS), COMMANDS
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {command.split()[1] for command in COMMANDS if command.startswith("make ")} <= targets


def test_torchrun_leaves_the_options_of_train_py_alone():
    """Without `--` it takes --run for an abbreviation of its --run-path."""
    assert len(TORCHRUN_COMMANDS) >= 5
    for command in TORCHRUN_COMMANDS:
        _, *args = shlex.split(command.partition("  #")[0])
        after = args[args.index("--") + 1 :]
        parsed = get_args_parser().parse_args(args)
        assert [parsed.training_script, *parsed.training_script_args] == after, command
        assert after[0] == "train.py"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make") or not shutil.which("git"), reason="needs make and git")
def test_make_demo_in_a_fresh_clone_twice(tmp_path):
    """Installs all packages, so it needs a package index; trains for three minutes, then again for 12 seconds."""
    clone = tmp_path / "a clone é"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for arguments in ("", "ARGS=--budget_minutes=0.2"):
        command = ["make", "demo", *filter(None, [arguments])]
        done = subprocess.run(command, cwd=clone, check=True, capture_output=True, text=True)
        assert done.stdout.count("(sample") > 3
    assert sorted(path.name for path in (clone / "runs").iterdir()) == ["quickstart-1", "quickstart-2"]
