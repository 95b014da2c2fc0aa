"""A run folder that somebody else has made, or changed, writes nothing outside itself, and chooses neither files nor
services."""

import json
import os
import shutil
import signal
import zlib
from contextlib import suppress
from pathlib import Path

import pytest

import train as train_script
from checkpoint import list_checkpoints
from common import signature
from errors import UserError
from files import json_bytes
from generation.novelty import open_novelty
from generation.options import SampleScriptOptions
from state_file import read_state
from tests.test_train import TINY
from training.report import main as report

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs links and pipes")


def train(*args: str) -> int:
    return train_script.main(list(args))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_text) -> Path:
    """A folder with a finished run of 20 steps and its data."""
    folder = tmp_path_factory.mktemp("strange run")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert train(*TINY, f"--data={small_text}", "--run=run") == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def _no_hang():
    """Ends a test that waits for the other end of a pipe."""
    signal.alarm(100)
    yield
    signal.alarm(0)


@pytest.fixture(autouse=True)
def here(finished, tmp_path, monkeypatch) -> Path:
    """A folder with a copy of the run, its data, and files that nobody may change."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "outside"
    (canary / "folder" / "step-00000001").mkdir(parents=True)
    for name in ("file", "folder/file", "folder/step-00000001/file", "folder/metrics.jsonl"):
        (canary / name).write_text("canary\n")
    return tmp_path


def contents(folder: Path) -> dict[str, object]:
    """All that is in a folder but the run, by path."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not name.startswith("run/"):
            found[name] = path.read_bytes() if path.is_file() else "folder"
    return found


def edit_state(run: Path, **changes: object) -> None:
    """Changes state.json of the last checkpoint as its writer would, but for the signature."""
    checkpoint = list_checkpoints(run)[-1]
    state = json.loads((checkpoint / "state.json").read_bytes())
    for name, value in changes.items():
        state[name] = {**(state.get(name) or {}), **value} if isinstance(value, dict) else value
    data = json_bytes(state)
    (checkpoint / "state.json").write_bytes(data)
    manifest = json.loads((checkpoint / "manifest.json").read_bytes())
    manifest["files"]["state.json"] = {"bytes": len(data), "crc32": zlib.crc32(data)}
    manifest.pop("crc32")
    manifest["crc32"] = zlib.crc32(json_bytes(manifest))
    (checkpoint / "manifest.json").write_bytes(json_bytes(manifest))


def place(kind: str, path: Path) -> None:
    """Puts something else in the place of a file or folder of the run."""
    outside = path.parents[len(path.parts) - 1 - path.parts.index("run")] / "outside"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
    path.parent.mkdir(exist_ok=True)
    if kind == "hard link":
        os.link(outside / "file", path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        os.symlink(outside / {"link": "file", "link to a folder": "folder", "link to nothing": "new"}[kind], path)


KINDS = ("link", "link to a folder", "link to nothing", "pipe", "hard link", "folder")
NEW = "checkpoints/step-00000024"
HARMLESS = ("config.json", "run.json", "report.html", "loss.png", ".base.writing", "checkpoints/set-aside", NEW)
HARMLESS += (f"{NEW}.writing", f"{NEW}.removing", f"{NEW}.replaced", "checkpoints/step-00000010")
FOLDERS = ("checkpoints", "tensorboard", "wandb", "base", "tries")


def resume_and_report(here: Path) -> str:
    """Resumes the run, which may be refused before its first step, and makes its report. Returns the refusal. Nothing
    outside of the run is changed, and nothing is new there."""
    before, refusal = contents(here), ""
    try:
        assert train("--resume=run", "--max_steps=24") == 0
        assert list_checkpoints(here / "run")[-1].name == "step-00000024"
    except UserError as error:
        refusal = str(error)
    with suppress(UserError):
        report(["run"])
    assert contents(here) == before
    return refusal


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written_through_what_lies_in_a_run(here, kind):
    for name in HARMLESS:
        place(kind, here / "run" / name)
    assert resume_and_report(here) == ""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "hard link"])
@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "samples.txt"])
def test_a_file_that_is_held_open_must_be_a_plain_one(here, name, kind):
    place(kind, here / "run" / name)
    assert name in resume_and_report(here)


def test_files_with_a_second_name_are_left_as_they_are(here):
    backup = here / "backup"
    shutil.copytree(here / "run", backup, copy_function=os.link)  # cp -al
    for name in ("lock", "metrics.jsonl", "samples.txt"):
        place("hard link", here / "run" / name)
    assert resume_and_report(here) == ""


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_of_a_run_is_no_link(here, name):
    if name == "checkpoints":  # with checkpoints that would be pruned there
        shutil.move(here / "run" / name, here / "outside" / name)
        (here / "outside" / name / "step-00000003.removing").mkdir()
        os.symlink(here / "outside" / name, here / "run" / name)
    else:
        place("link to a folder", here / "run" / name)
    assert f"run/{name} is a link" in resume_and_report(here)


def test_the_run_itself_may_be_a_link_and_so_may_its_parents(here):
    (here / "disk").mkdir()
    shutil.move(here / "run", here / "disk" / "run")
    os.symlink("disk", "other")
    os.symlink("other/run", "run")
    assert train("--resume=run", "--max_steps=24") == 0
    assert train("--resume=other/run", "--max_steps=28") == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "samples.txt", *HARMLESS, *FOLDERS])
def test_one_by_one(here, name, kind):
    place(kind, here / "run" / name)
    resume_and_report(here)


# ---- Paths and services ----------------------------------------------------------------------------------------------


@pytest.fixture
def secret(here) -> Path:
    """A text of this user that nobody has named."""
    path = here / "outside" / "secret.txt"
    path.write_text("".join(f"the password of account {i} is {i * i}\n" for i in range(3000)))
    return path


def test_a_stranger_chooses_no_text_and_no_folder(here, secret, capsys):
    """A system file was prepared as training data into a folder that state.json chose."""
    edit_state(
        here / "run",
        options={"data": str(secret), "data_dir": str(here / "elsewhere")},
        dataset={"path": str(here / "gone"), "name": "../gone"},
    )
    before = contents(here)
    with pytest.raises(UserError, match="was not made by you on this machine") as caught:
        train("--resume=run", "--max_steps=24")
    assert f"python train.py --resume=run --max_steps=24 --data={here / 'gone'}" in str(caught.value)
    assert contents(here) == before
    folder = list_checkpoints(Path("run"))[-1] / "model"
    state = read_state(folder.parent / "state.json")
    with pytest.raises(UserError, match="--data=PATH"):  # nor for sample.py and the report
        open_novelty(folder, state, None, SampleScriptOptions(novelty=True))
    report(["run"])
    assert contents(here) == before
    data = next((here / "data").iterdir())
    assert train("--resume=run", "--max_steps=24", f"--data={data}") == 0
    assert not (here / "elsewhere").exists()


def test_a_run_of_another_machine_resumes_with_its_text_named_bit_for_bit(here, small_text, monkeypatch, tmp_path):
    """Another key: a new machine, or a container whose home is not kept. The text is named once."""
    shutil.copytree("run", "other")
    shutil.rmtree("data")
    assert train("--resume=run", "--max_steps=24", f"--data={small_text}") == 0
    monkeypatch.setattr(signature, "key_files", lambda: [tmp_path / "new home" / "key"])
    with pytest.raises(UserError, match="--data=") as caught:
        train("--resume=other", "--max_steps=24")
    assert "not made by you" not in str(caught.value) or "--resume=other" in str(caught.value)
    assert train("--resume=other", "--max_steps=24", f"--data={small_text}") == 0
    for name in ("model/model.safetensors", "optimizer.safetensors"):
        one, two = (list_checkpoints(Path(run))[-1] / name for run in ("run", "other"))
        assert one.read_bytes() == two.read_bytes()
    assert train("--resume=other", "--max_steps=26") == 0  # it is this user's now
    assert (tmp_path / "new home" / "key").stat().st_mode & 0o777 == 0o600


def test_a_dataset_in_the_data_folder_needs_no_name(here, monkeypatch, tmp_path):
    monkeypatch.setattr(signature, "key_files", lambda: [tmp_path / "new home" / "key"])
    assert train("--resume=run", "--max_steps=24") == 0


def test_without_a_key_a_run_is_trained_and_resumed(here, monkeypatch, small_text):
    monkeypatch.setattr(signature, "key_files", lambda: [Path("/proc/no/key")])
    shutil.rmtree("data")
    assert train(*TINY, f"--data={small_text}", "--run=new", "--data_dir=texts") == 0
    assert "signature" not in json.loads(Path("new/config.json").read_text())
    with pytest.raises(UserError, match="--data="):
        train("--resume=new", "--max_steps=24")
    assert train("--resume=new", "--max_steps=24", "--data_dir=texts") == 0


def test_services_teachers_and_following_runs_of_a_stranger_are_left_off(here, capsys):
    chain = {"run": str(here / "chosen"), "arguments": ["debug"], "length": [], "minutes": None, "teachers": []}
    services = {"wandb": "online", "wandb_project": "theirs", "trackio": True, "trackio_project": "../theirs"}
    edit_state(here / "run", options={**services, "teachers": 1}, chain=chain)
    assert train("--resume=run", "--max_steps=24") == 0
    out = capsys.readouterr().out
    assert "note: wandb is left off, since you did not make this run here: --wandb=online turns it on" in out
    assert "note: trackio is left off" in out
    assert "note: the runs that follow this one are not begun" in out
    assert not (here / "chosen").exists()
    assert not (here / "run" / "wandb").exists()
    state = json.loads((list_checkpoints(here / "run")[-1] / "state.json").read_text())
    assert signature.is_own(state)
    assert (state["options"]["wandb"], state["options"]["trackio_project"]) == (None, "sprout")
    edit_state(here / "run", options={"teacher": [str(here / "outside")]}, teachers=[{"bytes": 1, "crc32": 1}])
    with pytest.raises(UserError, match=f"--teacher={here / 'outside'}"):
        train("--resume=run", "--max_steps=28")


@pytest.mark.parametrize("change", [{"data": "outside/secret.txt"}, {"init_from": "outside"}, {"data_dir": "chosen"}])
def test_the_saved_options_of_a_stranger_choose_no_files(here, secret, change):
    saved = json.loads(Path("run/config.json").read_text())
    saved["options"] |= change
    Path("run/config.json").write_text(json.dumps(saved))
    before = contents(here)
    with pytest.raises(UserError, match="the saved options were not written by you") as caught:
        train("run/config.json", "--run=again")
    (name, value), *_ = change.items()
    assert f"--{name}={value}" in str(caught.value)
    assert contents(here) == before


def test_the_saved_options_of_this_user_repeat_the_run(here):
    assert train("run/config.json", "--run=again") == 0
    saved = json.loads(Path("run/config.json").read_text())
    saved["options"]["learning_rate"] = 1e-4  # what needs no trust may be edited
    Path("run/config.json").write_text(json.dumps(saved))
    assert train("run/config.json", "--run=again-2") == 0


def test_the_key_is_made_once_whoever_is_first_and_belongs_to_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(signature, "key_files", lambda: [tmp_path / "a" / "key"])
    record = {"options": {"data": "x"}}
    one = signature.signed(record)
    assert signature.is_own(one)
    assert signature.is_own({**one, "step": 3})
    assert not signature.is_own({**one, "options": {"data": "y"}})
    assert not signature.is_own({**one, "chain": {}})
    assert not signature.is_own(record)
    for odd in (None, 3, "é", "0" * 64, []):
        assert not signature.is_own({**one, "signature": odd})
    assert os.listdir(tmp_path / "a") == ["key"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b").chmod(0o777)  # others may write there
    monkeypatch.setattr(signature, "key_files", lambda: [tmp_path / "b" / "key"])
    assert "signature" not in signature.signed(record)
