"""The order of the layers, the three copies of the table's columns, and what no file of the repository may hold."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

from fastdiff.compiler import layout

ROOT = Path(__file__).resolve().parent.parent

# What each layer may import besides itself and fastdiff.errors. An entry is a package or one module of it.
MAY_IMPORT = {
    "errors": set(),
    "files": set(),
    "kernels": set(),
    "process": set(),
    "images": {"files"},
    "compiler": {"process"},
    "models": {
        "process",
        "engine.ops",
        "engine.dispatch",
        "engine.norm",
        "engine.attention",
        "engine.onednn",
        "engine.winograd",
        "engine.winograd_train",
        "files",
    },
    "engine": {"process", "compiler", "models.denoiser", "files"},
    "report": {"process", "compiler", "files"},
    "training": {"process", "compiler", "engine", "models", "files", "images"},
    "integrations": {"process", "compiler", "engine", "models"},
}
NATIVE_USERS = {
    "engine.ops",
    "engine.guide",
    "engine.measure",
    "engine.train_ops",
    "engine.native",
    "engine.norm",
    "engine.backends",
}  # only these see fastdiff.kernels and fastdiff._C
TOP = {"", "cli"}  # the package itself and its command line see everything
TORCH_IN_COMPILER = {"compiler.trace", "compiler.capture"}
HEAVY = {"torch", "triton", "diffusers", "safetensors"}


def modules() -> dict[str, Path]:
    """Every module of the package: its name without "fastdiff." (the package itself is ""), and its file."""
    found = {}
    for folder, prefix in ((ROOT / "fastdiff", ""), (ROOT / "kernels", "kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = [part for part in (prefix, *path.relative_to(folder).with_suffix("").parts) if part]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> list[tuple[str, bool]]:
    """(module, at_top) for all that `name` imports, inside functions and for typing too; ours without "fastdiff."."""
    path = MODULES[name]
    tree = ast.parse(path.read_text())
    here = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []
    for node, at_top in _statements(tree, True):
        if isinstance(node, ast.Import):
            found += [(alias.name, at_top) for alias in node.names]
            continue
        base = node.module or ""
        if node.level:
            package = ["fastdiff", *here.split(".")] if here else ["fastdiff"]
            base = ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            found.append((full if full.removeprefix("fastdiff.") in MODULES else base, at_top))
    return found


def _statements(node: ast.AST, at_top: bool) -> list[tuple[ast.Import | ast.ImportFrom, bool]]:
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            found.append((child, at_top))
        else:
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            inside = isinstance(child, ast.FunctionDef | ast.Lambda) or typing_only
            found += _statements(child, at_top and not inside)
    return found


def own(name: str) -> list[tuple[str, bool]]:
    """The imports of `name` that are ours."""
    inside = [(target, at_top) for target, at_top in imports(name) if target.split(".")[0] == "fastdiff"]
    return [(target.partition(".")[2], at_top) for target, at_top in inside]


def covers(entry: str, target: str) -> bool:
    return target == entry or target.startswith(entry + ".")


def forbidden(name: str, target: str) -> bool:
    layer = name.partition(".")[0]
    if layer in TOP or covers(layer, target) or target == "errors":
        return False
    if covers("kernels", target) or target == "_C":
        return name not in NATIVE_USERS
    return not any(covers(entry, target) for entry in MAY_IMPORT[layer])


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    layer = name.partition(".")[0]
    assert layer in TOP or layer in MAY_IMPORT, f"{name} is in no known layer; add it to MAY_IMPORT"
    wrong = [target or "fastdiff" for target, _ in own(name) if forbidden(name, target)]
    assert not wrong, f"{name} must not import {', '.join(wrong)}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.partition(".")[0] in ("process", "compiler")])
def test_tables_are_made_without_torch(name):
    if any(covers(entry, name) for entry in TORCH_IN_COMPILER):
        return
    wrong = {target for target, _ in imports(name) if target.partition(".")[0] in HEAVY}
    assert not wrong, f"{name} must not import {', '.join(sorted(wrong))}: tables are NumPy and float64"


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {name: {target for target, at_top in own(name) if at_top and target in MODULES} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"circular import: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in sorted(graph[name] - {name}):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_direction_test_sees_wrong_imports():
    assert forbidden("process.grids", "compiler.plan")
    assert forbidden("compiler.plan", "engine.ops")
    assert forbidden("engine.sampler", "models.unet")
    assert forbidden("engine.sampler", "kernels.affine")
    assert forbidden("kernels.affine", "compiler.layout")
    assert forbidden("models.unet", "engine.sampler")
    assert forbidden("engine.sampler", "cli")
    assert forbidden("training.data", "")
    assert not forbidden("engine.ops", "kernels.affine")
    assert not forbidden("engine.sampler", "models.denoiser")
    assert not forbidden("models.unet", "engine.ops")
    assert not forbidden("cli", "engine.machine")


# The name that a header of csrc has for each column of fastdiff.compiler.layout; its slots do not count x.
HEADER_NAMES = {
    "kP": layout.P,
    "kQ": layout.Q,
    "kGain": layout.GAIN,
    "kClampLo": layout.CLAMP_LO,
    "kClampHi": layout.CLAMP_HI,
    "kEmitScale": layout.EMIT_SCALE,
    "kEmitTime": layout.EMIT_TIME,
    "kPerturb": layout.PERTURB,
    "kOutput": layout.OUTPUT,
    "kOutputStride": layout.OUTPUT_STRIDE,
    "kOutK": layout.OUT_K,
    "kOutDelta": layout.OUT_DELTA,
    "kOutB": layout.OUT_B,
    "kOutE": layout.OUT_E,
    "kOutA": layout.OUT_A,
    "kSpreadLog": layout.SPREAD_LOG,
    "kSpreadSlope": layout.SPREAD_SLOPE,
    "kTerm": layout.NOISE,
    "kTermStride": layout.NOISE_STRIDE,
    "kSlotRegister": layout.SLOT,
    "kOutputRegister": layout.DEST,
    "kFlags": layout.FLAGS,
    "kTermCount": layout.TERMS,
    "kSlotCount": layout.SLOTS,
    "kTermId": layout.TERM_IDS,
    "kTermIdStride": layout.TERM_IDS_STRIDE,
    "kReadsModel": layout.READS_MODEL,
    "kEUnguided": layout.E_UNGUIDED,
    "kSpreadsNoise": layout.SPREADS_NOISE,
    "kMaxOutputs": layout.MAX_OUTPUTS,
    "kMaxSlots": layout.MAX_SLOTS - 1,
    "kMixW": layout.MIX_W,
    "kMixU": layout.MIX_U,
    "kMixP": layout.MIX_P,
    "kMixQ": layout.MIX_Q,
    "kMixM": layout.MIX_M,
    "kMixBound": layout.MIX_BOUND,
    "kMixPost": layout.MIX_POST,
    "kMixS": layout.MIX_S,
    "kMix": layout.MIX,
    "kPlain": layout.PLAIN,
    "kRescale": layout.RESCALE,
    "kApg": layout.APG,
    "kCfgZero": layout.CFG_ZERO,
    "kPhi": layout.PHI,
    "kEta": layout.ETA,
    "kBeta": layout.BETA,
    "kRadius": layout.RADIUS,
    "kPercentile": layout.PERCENTILE,
    "kCeiling": layout.CEILING,
    "kSettings": layout.SETTINGS,
    "kParts": layout.PARTS,
    "kSums": layout.SUMS,
    "kError": layout.ERROR,
    "kChange": layout.CHANGE,
    "kInputX0": layout.INPUT_X0,
    "kInputZ": layout.INPUT_Z,
    "kInputY": layout.INPUT_Y,
    "kTargetX0": layout.TARGET_X0,
    "kTargetZ": layout.TARGET_Z,
    "kTargetY": layout.TARGET_Y,
    "kFlip": layout.FLIP,
    "kTrainColumns": layout.TRAIN_COLUMNS,
    "kNoiseZ": layout.NOISE_Z,
    "kNoiseY": layout.NOISE_Y,
    "kStreamTraining": layout.STREAM_TRAINING,
}


def test_columns_of_the_headers_are_the_layout():
    headers = (ROOT / "csrc" / name for name in ("affine.h", "guide.h", "measure.h", "train.h"))
    text = re.sub(r"//.*", "", "".join(header.read_text() for header in headers))
    found: dict[str, int] = {}
    for definitions in re.findall(
        r"(?:constexpr int(?:32_t)?|enum (?:Rule|Quantity) : int32_t {) (k[^;}]+) ?[;}]", text
    ):
        for name, value in re.findall(r"(k\w+)\s*=\s*([^,]+)", definitions):
            found[name] = eval(value, {"__builtins__": {}}, dict(found))
    assert {name: found.get(name) for name in HEADER_NAMES} == HEADER_NAMES


def test_columns_of_the_kernel_are_the_layout():
    found: dict[str, int] = {}
    for node in ast.parse((ROOT / "kernels/layout.py").read_text()).body:
        target = node.target if isinstance(node, ast.AnnAssign) else None
        value = getattr(node, "value", None)
        if isinstance(target, ast.Name) and hasattr(layout, target.id):
            if isinstance(value, ast.Call):  # tl.constexpr(3)
                value = value.args[0]
            found[target.id] = ast.literal_eval(value)
    used = {"P", "Q", "OUTPUT", "OUT_K", "OUT_DELTA", "OUT_B", "OUT_A", "NOISE", "SLOT", "DEST", "TERM_IDS"}
    assert used <= found.keys()
    assert found == {name: getattr(layout, name) for name in found}


def tracked() -> list[Path]:
    """The repository's text files: tracked, or new and not ignored."""
    listing = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listing.returncode:
        pytest.skip("not a git checkout, so its files are not known")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


# Where packages come from and where somebody's checkout lies is nobody else's business.
FORBIDDEN_TEXT = {
    "the host of a package registry": r"(?:pypi|pythonhosted|npmjs|crates|anaconda)\.(?:org|com|io)|deb\.debian\.org"
    r"|download\.pytorch\.org|--(?:extra-)?index-url|--find-links",
    "a path of one machine": r"(?<![\w./])/(?:work|root|home|Users|opt)/\w|(?<![\w./])/tmp/(?:dev|fd)",
}


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_no_file_holds(what):
    pattern = re.compile(FORBIDDEN_TEXT[what])
    found = []
    for path in tracked():
        if path == Path(__file__) or path.suffix in (".png", ".safetensors", ".gz"):
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, f"{what}:\n" + "\n".join(found)


def test_weights_are_small():
    weights = sum(path.stat().st_size for path in tracked() if path.suffix in (".safetensors", ".npz", ".pt"))
    assert weights <= 8 * 2**20, f"the weights in the repository are {weights / 2**20:.1f} MiB, at most 8 are allowed"


def test_kernels_under_its_bare_name_looks_like_no_package() -> None:
    """transformers asks for a `kernels` of its own, and finds this folder where Python runs from the repository."""
    spec = importlib.util.spec_from_file_location("kernels", ROOT / "kernels" / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.__file__ is None and not hasattr(module, "__version__")
    with pytest.raises(ImportError, match="must be imported as `fastdiff.kernels`"):
        module.affine  # noqa: B018
