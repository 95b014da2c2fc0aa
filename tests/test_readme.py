"""Every command of README.md starts and ends well, in the order in which it stands there, with a tiny text and two steps."""

import io
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import sample as sample_script
import train as train_script
from prepare_data.__main__ import main as prepare_main
from training.report import main as report_main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
COMMANDS = [re.sub(r"    #.*", "", command) for command in COMMANDS if command]
RUN = [
    command for command in COMMANDS if command.startswith("python ")
]  # the others set up the environment: make and pip
SMALL = [
    "--n_layer=1",
    "--n_head=2",
    "--n_embd=16",
    "--block_size=16",
    "--tokens_per_step=64",
    "--budget_minutes=none",
    "--warmup_steps=1",
]
QUICK = ["--max_steps=2", "--eval_tokens=300", "--sample_tokens=3", "--final_samples=1", "--threads=1"]


@pytest.fixture
def _a_users_folder(tmp_path, monkeypatch, small_text):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("server.app.Server.run", lambda server, sockets: None)  # it would serve for ever
    text = small_text.read_text("utf-8")
    Path("my_novel.txt").write_text(text, encoding="utf-8")
    Path("letters.txt").write_text(text[:20_000], encoding="utf-8")
    Path("names.txt").write_text(
        "\n".join(line.split()[0] + str(i) for i, line in enumerate(text.splitlines())), encoding="utf-8"
    )
    Path("prompt.txt").write_text("Anna sees", encoding="utf-8")
    Path("many.jsonl").write_text('"Anna"\n{"prompt": "Once", "id": 7}\n', encoding="utf-8")
    monkeypatch.setattr("sys.stdin", io.StringIO("Anna sees\n/retry\n"))  # for --interactive
    Path("folder").mkdir()
    for part in range(30):
        Path("folder", f"{part}.txt").write_text(text[2000 * part : 2000 * part + 2000], encoding="utf-8")


def start(command: str) -> int:
    script, *args = shlex.split(command.partition(" > ")[0])[1:]
    if script == "train.py":
        resuming = any(arg.startswith(("--resume", "--init_from")) for arg in args)
        args += (
            QUICK
            if not resuming
            else ["--threads=1"]
            if any("max_steps" in arg for arg in args)
            else ["--max_steps=3", "--threads=1"]
        )
        if not resuming:
            args += SMALL
        elif any(arg.startswith("--init_from") for arg in args):
            args += ["--tokens_per_step=64", "--budget_minutes=none", "--eval_tokens=300", "--sample_tokens=3"]
        if not any(arg.startswith(("--data", "--resume")) for arg in args):
            args.append("--data=my_novel.txt")
        return train_script.main(args)
    if script == "sample.py":
        args += ["--port=0"] if "--serve" in args else []
        return sample_script.main([*args, "--max_new_tokens=5", "--threads=1"])
    module, *args = args
    assert script == "-m", command
    return {"prepare_data": prepare_main, "training.report": report_main}[module](args) or 0


@pytest.mark.usefixtures("_a_users_folder")
def test_every_command_runs(capsys):
    assert len(RUN) > 20
    for command in RUN:
        if command.endswith("--help"):
            with pytest.raises(SystemExit) as ended:
                start(command)
            assert ended.value.code == 0
        else:
            assert start(command) == 0, command


def test_the_readme_names_no_unknown_command():
    allowed = ("python ", "make ", "python3 -m venv", ".venv/bin/python ")
    assert all(command.startswith(allowed) for command in COMMANDS), COMMANDS
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert {command.split()[1] for command in COMMANDS if command.startswith("make ")} <= targets


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("make") or not shutil.which("git"), reason="needs make and git")
def test_make_demo_in_a_fresh_clone_twice(tmp_path):
    """Installs everything anew, so it needs a package index; trains for three minutes, then shortly a second time."""
    clone = tmp_path / "a clone é"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    for arguments in ("", "ARGS=--budget_minutes=0.2"):
        done = subprocess.run(
            ["make", "demo", *filter(None, [arguments])], cwd=clone, check=True, capture_output=True, text=True
        )
        assert done.stdout.count("---- sample") > 3
    assert sorted(path.name for path in (clone / "runs").iterdir()) == ["quickstart-1", "quickstart-2"]
