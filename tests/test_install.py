"""Every way to install: from the sdist with and without a compiler, editable, and what must travel with each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("fastdiff", "kernels", "csrc", "recipes", "bench", "tests", "docs", ".ci")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "Makefile", "constraints.txt")
pytestmark = pytest.mark.long
INSTALL = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-compile")
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}

REPORT = """
import fastdiff, fastdiff.kernels
cpp = fastdiff.backends()["cpp"]
print(fastdiff.__file__, fastdiff.kernels.__file__, cpp.ok, cpp.reason, cpp.fix, sep="\\n")
print(fastdiff.load("fashion").shape)
print(fastdiff.sample(fastdiff.Denoiser(lambda x, t: 0 * x, "linear"), (2, 5), steps=3).shape)
"""


def run(*arguments: str | Path, cwd: Path, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("FASTDIFF_REQUIRE_EXTENSION", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=env | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def report(site: Path, cwd: Path) -> list[str]:
    """What the package in `site` says of itself: -S and the paths by hand keep this environment's own copy out."""
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    code = (
        f"import sys, site; sys.path += {packages}; sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})"
    )
    lines = run("-P", "-S", "-c", f"{code}\n{REPORT}", cwd=cwd).splitlines()
    assert lines[-2:] == ["(1, 32, 32)", "torch.Size([2, 5])"]
    return lines[:-2]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without anything that was built, as a fresh clone has them."""
    copy = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.so", "*.o", "__pycache__", "*.egg-info", ".*_cache", "gpu")
    for name in SOURCES:
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    for name in FILES:
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, made by the build backend that pip uses."""
    out = tmp_path_factory.mktemp("dist")
    run("-c", f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})", cwd=checkout)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def installed(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist installed with its extension left out."""
    site = tmp_path_factory.mktemp("site")
    run(*INSTALL, "--target", site, sdist, cwd=site, FASTDIFF_NO_EXTENSION="1")
    return site


def test_sdist_holds_all_sources(checkout: Path, sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("fastdiff", "kernels", "csrc", "recipes", "bench", "tests")
    wanted = {str(path.relative_to(checkout)) for folder in folders for path in (checkout / folder).rglob("*.*")}
    wanted |= set(FILES)
    wanted = {name for name in wanted if ".egg-info" not in name and "__pycache__" not in name}
    assert "csrc/affine.h" in wanted and "kernels/affine.py" in wanted
    assert "fastdiff/models/weights/fashion.safetensors" in wanted
    assert not wanted - held
    assert not [name for name in held if name.endswith((".so", ".o", ".pyc"))]


def test_install_without_extension(installed: Path, tmp_path: Path) -> None:
    package, kernels, ok, reason, fix = report(installed, tmp_path)
    assert Path(package) == installed / "fastdiff/__init__.py"
    assert Path(kernels) == installed / "fastdiff/kernels/__init__.py"
    assert ok == "False"
    assert "extension is not in" in reason
    assert "compiler" in fix and "--no-build-isolation" in fix
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == ["bin", "fastdiff"]


def test_command_is_installed(installed: Path, tmp_path: Path) -> None:
    shown = run(installed / "bin/fastdiff", "info", cwd=tmp_path, PYTHONPATH=str(installed))
    assert re.search(r"cpp\s+not here: .*compiler", shown)


def test_licence_and_requirements_are_installed(installed: Path) -> None:
    (info,) = installed.glob("*.dist-info")
    assert list(info.rglob("LICENSE"))
    metadata = (info / "METADATA").read_text()
    assert "Apache-2.0" in metadata
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", metadata, re.M))
    assert required == {"torch", "triton", "numpy", "safetensors", "pillow", "tqdm", "nvidia-ml-py"}


def test_install_where_no_compiler_is_found(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    run(*INSTALL, "--target", site, checkout, cwd=tmp_path, **NO_COMPILER)
    _, _, ok, reason, fix = report(site, tmp_path)
    assert ok == "False"
    assert "extension is not in" in reason and "compiler" in fix


def test_required_extension_that_fails_stops_the_install(checkout: Path, tmp_path: Path) -> None:
    """In the hook of the build backend that makes pip's wheel; the test above goes through pip."""
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(tmp_path)!r})"
    with pytest.raises(AssertionError, match="nonexistent"):
        run("-c", build, cwd=checkout, **NO_COMPILER, FASTDIFF_REQUIRE_EXTENSION="1")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_install_from_sdist_builds_the_extension(sdist: Path, tmp_path: Path) -> None:
    """With a compiler that does not optimise, which the set-up of these tests has done once, in a third of the time."""
    site, quick = tmp_path / "site", tmp_path / "c++"
    quick.write_text(f'#!/bin/sh\nexec {shutil.which("g++") or shutil.which("clang++")} "$@" -O0\n')
    quick.chmod(0o755)
    run(*INSTALL, "--target", site, sdist, cwd=tmp_path, FASTDIFF_REQUIRE_EXTENSION="1", CXX=str(quick))
    package, kernels, ok, *_ = report(site, tmp_path)
    assert Path(package).is_relative_to(site) and Path(kernels).is_relative_to(site)
    assert ok == "True"


def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    run(*INSTALL, "--prefix", tmp_path, "--ignore-installed", "-e", checkout, cwd=tmp_path, FASTDIFF_NO_EXTENSION="1")
    (pth,) = tmp_path.rglob("*.pth")
    package, kernels, *_ = report(pth.parent, tmp_path)
    assert Path(package) == checkout / "fastdiff/__init__.py"
    assert Path(kernels) == checkout / "kernels/__init__.py"


def test_nothing_is_compiled_for_this_machine_only() -> None:
    text = (ROOT / "setup.py").read_text()
    assert not re.search(r"-march=|-mtune=|-ffast-math|-Ofast", text)
    assert "native" not in os.environ.get("CFLAGS", "") + os.environ.get("CXXFLAGS", "")


def test_tested_versions_are_pinned_and_allowed() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert pins["torch"] in (ROOT / "Makefile").read_text()
    named = re.findall(
        r'"([\w-]+)(?:[>=;].*?)?"', (ROOT / "pyproject.toml").read_text().partition("[project.scripts]")[0]
    )
    packages = {name for name in named if name in pins}
    assert {"torch", "triton", "numpy", "safetensors", "pillow", "tqdm", "pytest", "diffusers", "ninja"} <= packages
