"""Every buffer from torch.empty starts as NaN, so that reading a slot nobody wrote fails a test.

On the CPU, the default, Triton's interpreter runs the kernels. `pytest --device cuda` runs the tests of the operations
on a GPU instead, as compiled; the tests of whole runs, which are compared bit for bit, are for the CPU alone.
"""

import os

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the operations' tests run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which no test has done yet
    else:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # without it, deterministic algorithms refuse matrix products
    for name in ("cpu", "cuda"):
        config.addinivalue_line("markers", f"{name}: runs with --device {name} alone")
    torch.set_num_threads(1)  # the tensors here are small, and a second busy process then costs nothing
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked cpu or cuda run on that device alone: deselected elsewhere, as nothing there could run them."""
    other = "cuda" if config.getoption("--device") == "cpu" else "cpu"
    config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker(other)])
    items[:] = [item for item in items if not item.get_closest_marker(other)]


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
