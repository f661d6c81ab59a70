"""How the package is found: from a checkout, a wheel and an editable install, beside PyPI's package `kernels`; that
importing it is light; and that README's snippets run."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Every public name, a submodule of the kernels, and a computation through each of their folders.
USE_EVERYTHING = """
import klq_fast, sys
for name in klq_fast.__all__:
    getattr(klq_fast, name)
import klq_fast.kernels.log_ratio.op
from klq_fast import kernels
assert klq_fast.kernels.log_ratio.op.logprobs is kernels.log_ratio.op.logprobs is klq_fast.logprobs
import torch
hidden, head, tokens = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randint(5, (2, 3))
ref_logprobs = klq_fast.linear_logprobs(hidden, head, tokens)
log_ratio = klq_fast.log_ratio(hidden @ head.T, hidden @ head.T, tokens)
target = klq_fast.lambda_returns(log_ratio, torch.zeros(2, 3), torch.ones(2), tau=0.05)
klq_fast.linear_klq_loss(hidden, head, tokens, ref_logprobs, torch.zeros(2, 3), target.returns, tau=0.05)
print(klq_fast.__file__)
print(sys.modules["klq_fast.kernels.log_ratio.op"].__file__)
"""


def python(code: str, *, cwd: Path, path: Sequence[Path] = (), executable: str | Path = sys.executable) -> list[str]:
    """The lines that a fresh interpreter prints, with `path` on its PYTHONPATH and nothing else of ours."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    result = subprocess.run(
        [executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def pip(*arguments: str | Path) -> None:
    environment = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what an installation reads, so that building leaves nothing here, with the traces of use."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / name, checkout)
    for name in ("klq_fast", "kernels", "tests"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (checkout / "kernels", checkout / "kernels" / "log_ratio", checkout / "klq_fast"):
        (folder / "__pycache__").mkdir()
        (folder / "__pycache__" / "old.cpython-311.pyc").write_bytes(b"")
    return checkout


def test_a_bare_checkout(checkout: Path, tmp_path: Path) -> None:
    """Nothing but torch and a C compiler is needed for the operations, none of the training loop's libraries."""
    for name in "transformers accelerate tyro rich matplotlib yaml datasets".split():
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('{name} is not installed')")
    package, kernel = python(USE_EVERYTHING, cwd=tmp_path, path=[tmp_path, checkout])
    assert Path(package) == checkout / "klq_fast" / "__init__.py"
    assert Path(kernel) == checkout / "kernels" / "log_ratio" / "op.py"


def test_a_wheel(checkout: Path, tmp_path: Path) -> None:
    """It holds klq_fast and nothing beside it, every source file, and works where there is no checkout."""
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, checkout)
    (wheel,) = tmp_path.glob("klq_fast-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    held = {name for name in names if ".dist-info/" not in name}
    package = {p.relative_to(ROOT).as_posix() for p in (ROOT / "klq_fast").rglob("*.py")}
    sources = [p for p in (ROOT / "kernels").rglob("*") if p.suffix in (".py", ".c", ".h")]
    kernels = {f"klq_fast/{p.relative_to(ROOT).as_posix()}" for p in sources}
    assert held == package | kernels | {"klq_fast/py.typed"}
    assert {
        f"klq_fast/kernels/{op}/op.py" for op in ("klq_loss", "lambda_returns", "linear_logprob", "log_ratio")
    } < held
    pip("install", "--no-deps", "--no-index", "--target", tmp_path / "site", wheel)
    package_file, kernel = python(USE_EVERYTHING, cwd=tmp_path, path=[tmp_path / "site"])
    assert Path(package_file) == tmp_path / "site" / "klq_fast" / "__init__.py"
    assert Path(kernel) == tmp_path / "site" / "klq_fast" / "kernels" / "log_ratio" / "op.py"
    # The checkout as the current folder: its own files win, and the two are not mixed.
    package_file, kernel = python(USE_EVERYTHING, cwd=checkout, path=[tmp_path / "site"])
    assert (Path(package_file).parents[1], Path(kernel).parents[2]) == (checkout, checkout)


def test_an_editable_install(checkout: Path, tmp_path: Path) -> None:
    """In a new environment, which borrows this one's libraries without its own installation of klq_fast."""
    venv.create(tmp_path / "venv", symlinks=True)
    executable = tmp_path / "venv" / "bin" / "python"
    (its_packages,) = python(
        "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path, executable=executable
    )
    (Path(its_packages) / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    build = "--no-deps --no-index --no-build-isolation".split()
    pip("--python", executable, "install", *build, "--editable", checkout)
    package, kernel = python(USE_EVERYTHING, cwd=tmp_path, executable=executable)
    assert Path(package) == checkout / "klq_fast" / "__init__.py"
    assert Path(kernel) == checkout / "kernels" / "log_ratio" / "op.py"


def test_importing_is_light(tmp_path: Path) -> None:
    """Neither transformers nor accelerate nor anything else that torch does not import by itself."""
    code = """
import sys, torch, numpy
before = set(sys.modules)
import klq_fast
print(*{name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names - {"torch", "numpy"})
print("transformers" in sys.modules, "accelerate" in sys.modules)
"""
    assert python(code, cwd=tmp_path, path=[ROOT]) == ["klq_fast", "False False"]


def test_the_name_trap(tmp_path: Path) -> None:
    """transformers looks for PyPI's package `kernels`. From the root of this checkout our folder of that name must not
    stand in for it: where the real one is installed it is found, and where it is not transformers works as well."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text("REAL = True\n")
    code = USE_EVERYTHING + "import kernels\nassert kernels.REAL\nprint(kernels.__file__)"
    *_, real = python(code, cwd=ROOT, path=[site])
    assert Path(real) == site / "kernels" / "__init__.py"
    code = """
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer
import klq_fast
config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
model = AutoModelForCausalLM.from_config(config)
import torch
print(*model(input_ids=torch.tensor([[1, 2]])).logits.shape)
import klq_fast.train
"""
    assert python(code, cwd=ROOT)[-1] == "1 2 9"


def test_readme_s_snippets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order and in one namespace, as a reader would try them."""
    blocks = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert blocks
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["score"](["p"], ["ten words"]) == [-0.8]  # type: ignore[operator]
