"""What every test shares: which tests run by default, and the check that none is skipped without our knowing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test processes share the cores: torch, imported after this, would start a thread for every core in each of them.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))

# Reasons a complete machine may have to skip a test; with --strict-skips any other one is a failure.
EXPECTED_SKIPS = ("CUDA device", "Fashion-MNIST", "k-diffusion is not installed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--strict-skips",
        action="store_true",
        help="fail on tests that are skipped for another reason than: no " + ", no ".join(EXPECTED_SKIPS),
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("markexpr"):
        left_out = ("slow", "alone") if "PYTEST_XDIST_WORKER_COUNT" in os.environ else ("slow",)
        others = {item for item in items if any(item.get_closest_marker(name) for name in left_out)}
        config.hook.pytest_deselected(items=list(others))
        items[:] = [item for item in items if item not in others]
    # one that takes long and comes last would keep a test process busy after the others have ended
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if any(item.get_closest_marker("gpu") for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if item.get_closest_marker("gpu"):
                    item.add_marker(pytest.mark.skip(reason="torch sees no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and item.config.getoption("strict_skips"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(expected in reason for expected in EXPECTED_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"skipped under --strict-skips: {reason}"
    return report


@pytest.fixture
def single_thread() -> Iterator[None]:
    """torch on one thread, and as many as before afterwards: a training run sets its own number."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def quiet_diffusers() -> None:
    """Of what diffusers logs, only the errors."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """What a tiny run trains on."""
    from tiny_runs import write_data

    return write_data(tmp_path)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return Path(__file__).resolve().parent.parent
