"""Shared by all tests: one thread per worker, the project on sys.path, a small text, a browser."""

import atexit
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

USER_DATA = tempfile.mkdtemp(prefix="sprout-tests-")  # not the home of who runs the tests; processes inherit it
atexit.register(shutil.rmtree, USER_DATA, ignore_errors=True)
os.environ["XDG_DATA_HOME"] = USER_DATA
os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; must be set before torch is imported
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

torch.set_num_threads(1)

import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    trial = "runs the tests marked gpu on the CPU, in tiny sizes and with Triton's interpreter: pytest -m gpu --on-cpu"
    parser.addoption("--on-cpu", action="store_true", help=trial)


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` uses a GPU. All other tests see none, so that they are the same everywhere."""
    selected = config.option.markexpr
    if config.option.on_cpu or "gpu" not in selected or "not gpu" in selected:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when CUDA is first used
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for --deterministic; read at the first product
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # runs kernels in Python; read when Triton is first imported
    ignored = {"SIGINT": signal.default_int_handler, "SIGHUP": signal.SIG_DFL}  # by a shell's & and by nohup
    for name, handler in ignored.items():
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)  # what the tests start would inherit that


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device of a test marked gpu."""
    if not (torch.cuda.is_available() or request.config.option.on_cpu):
        pytest.skip("no CUDA device; --on-cpu tries the test on the CPU")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def small_text(tmp_path_factory) -> Path:
    """A file of 60 kB of simple sentences, in a folder with a space and non-ASCII letters in its name."""
    folder = tmp_path_factory.mktemp("kleiner Korpus é")
    names = ("Anna", "Ben", "Cleo", "Dora")
    verbs = ("sees", "takes", "likes", "draws")
    things = ("a cat", "the moon", "two trees", "water")
    lines = [f"{names[i % 4]} {verbs[i // 4 % 4]} {things[i // 16 % 4]} {i % 10}.\n" for i in range(3000)]
    path = folder / "sätze 1.txt"
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser():
    """The system's Chromium, controlled by playwright; tests are skipped without them."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no Chromium on this machine")
    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=executable, args=["--no-sandbox"] if as_root else [])
        yield launched
        launched.close()


@pytest.fixture(autouse=True)
def _signals_as_before():
    """A script's end ignores signals (errors.run_script); the processes of later tests would inherit that."""
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
