"""The page of all samplers: their table as Markdown and a plot of error against evaluations.

May import: compiler, files. The same registry gives the same two files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fastdiff.compiler import convergence
from fastdiff.compiler.convergence import AdaptiveMeasurement, Measurement
from fastdiff.compiler.verify import DATA_VARIANCES
from fastdiff.compiler.verify_adaptive import ELEMENTS
from fastdiff.files import check_writable_file, write_atomically
from fastdiff.report import plot
from fastdiff.report.families import FAMILIES, OTHER, PROMISED, REMARKS, family

AnyMeasurement = Measurement | AdaptiveMeasurement

HEADER = """# Samplers and their measured order

Made by `fastdiff verify --all`, which compiles every sampler with its default options and pushes the law of Gaussian
data N(0, v) through its table exactly: nothing is drawn and no network is called.
{count} samplers, {failed}.

```
fastdiff verify --solver dpmpp_2m      # the laws, order, bias and cost of one sampler
fastdiff verify --solver my_solver.py  # the same for your own: a file that registers it with @fd.solver
fastdiff verify --solver my_package.samplers:mine  # or a module of your package
```

`--solver` also runs the suite that every sampler here passes: its order, and each schedule, grid, prediction and
executor of the CPU.
In a test of your own:

```python
@pytest.mark.parametrize("trial", fd.suite.trials("mine"), ids=str)
def test_mine(trial):
    outcome = trial.run()
    assert outcome.ok, outcome.sentence
```

*Error*: of the variance of the state that enters the last evaluation, relative to the exact one, signed (below 0 the
samples spread too little), the worst of v = {variances}. *Order*: how fast that error falls from {coarse} to {fine}
steps, as a power of the steps; for a sampler that draws noise it is the weak order of the variance. *At NFE 20*: the
run of most steps that costs at most 20 evaluations. *Registers* is what the table of 20 steps keeps in memory; *width*
is the most outputs and inputs of one row (the model output and the noise are not counted). Schedule edm, for flow
samplers rectified_flow; grid karras from sigma/alpha = {top:g} to {bottom:g}.

This is one measure: on Gaussian data D is linear in the state, so errors of a method that only nonlinear data show are
not in it, and the leading error may cancel (an order above the declared one). A distilled or poorly trained network
has errors of its own.

![Error against evaluations, all samplers]({plot})

Lines that coincide lie over one another, the first of the legend widest below. What is outside the axes is not drawn.

| Sampler | Order declared | measured | Error at NFE 20 | Registers | Width | Noise | What it is |
|---|---:|---:|---:|---:|---|---|---|
"""

ADAPTIVE = """## Adaptive

These choose their steps from an estimate of their error, so they have tolerances instead of steps and are not in the
plot. NumPy in float64 on one sample of {elements} numbers from N(1, v): *error* of the last noisy state against the
exact solution of the probability-flow ODE, root mean square over the data's spread, the worst of v = {variances};
*NFE* counts the evaluations of rejected steps too. The tolerance is rtol and atol; the defaults are those of
k-diffusion for dpm_adaptive, 0.05 and 0.0078, and 1e-5 for rk45. At loose tolerances dpm_adaptive may end far above
them: in a long step its two solutions can agree by chance.

| Sampler | Tolerance | NFE | Accepted | Rejected | Error |
|---|---:|---:|---:|---:|---:|
"""

PLOT_TITLE = "Error of the variance on Gaussian data (worst case) against model evaluations"


def measure_all(names: Iterable[str]) -> list[AnyMeasurement]:
    """Every named solver, measured."""
    return [convergence.measure(name) for name in names]


def write(out: Path, measured: Sequence[AnyMeasurement]) -> Path:
    """Write the page to `out` (.md) and its plot beside it; returns the plot's path. Neither is left half-written."""
    picture = picture_path(out)
    image = plot.draw(PLOT_TITLE, curves(measured))
    page = text(measured, picture.name)
    write_atomically(picture, lambda temporary: image.save(temporary, format="PNG", optimize=True))
    write_atomically(out, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return picture


def check_writable(out: Path) -> None:
    """Raise ValueError or OSError now if `out` is no name for a page or could not be written later."""
    if out.suffix != ".md":
        raise ValueError(f"--out {out} must end in .md; the plot is written beside it as .png")
    check_writable_file(out)
    check_writable_file(picture_path(out))


def picture_path(out: Path) -> Path:
    """Where the plot of a page lies."""
    return out.with_suffix(".png")


def curves(measured: Sequence[AnyMeasurement]) -> dict[str, list[plot.Curve]]:
    """The lines of each panel: |error| of every solver whose order has a meaning."""
    panels: dict[str, list[plot.Curve]] = {title: [] for title in (*FAMILIES, OTHER)}
    for m in measured:
        if isinstance(m, Measurement) and not m.unjudged:
            points = [(nfe, abs(error)) for nfe, error in m.curve]
            panels[family(m.solver.function.__module__)].append(plot.Curve(m.solver.name, points))
    return {title: lines for title, lines in panels.items() if lines}


def text(measured: Sequence[AnyMeasurement], picture: str) -> str:
    """The whole page."""
    failed = [m.solver.name for m in measured if not m.ok]
    header = HEADER.format(
        count=len(measured),
        failed=f"failing: {', '.join(failed)}" if failed else "all of which keep their laws and their declared order",
        variances=", ".join(f"{v:g}" for v in DATA_VARIANCES),
        coarse=convergence.STEPS[-2],
        fine=convergence.STEPS[-1],
        top=convergence.ENDS["sigma_max"],
        bottom=convergence.ENDS["sigma_min"],
        plot=picture,
    )
    tables = [m for m in measured if isinstance(m, Measurement)]
    sections = [header + "\n".join(_line(m) for m in tables if not m.unjudged)]
    adaptive = [m for m in measured if isinstance(m, AdaptiveMeasurement)]
    if adaptive:
        sections.append(_adaptive(adaptive))
    notes = [_note(m) for m in tables if m.solver.name in PROMISED and not m.unjudged]
    if notes:
        sections.append(
            "## Where the order is below what a paper, a library or the name promises\n\n" + "\n".join(notes)
        )
    remarks = [f"- `{m.solver.name}`: {REMARKS[m.solver.name]}." for m in measured if m.solver.name in REMARKS]
    if remarks:
        sections.append("## What the measured order does not say\n\n" + "\n".join(remarks))
    unjudged = [m for m in tables if m.unjudged]
    if unjudged:
        sections.append(
            "## Not measured\n\nTheir tables are held to the same laws, but these errors have no order.\n\n"
            "| Sampler | Why | Registers | Width | Noise | What it is |\n|---|---|---:|---|---|---|\n"
            + "\n".join(f"| `{m.solver.name}` | {m.unjudged} | {_cost(m)} |" for m in unjudged)
        )
    return "\n\n".join(sections) + "\n"


def _adaptive(measured: Sequence[AdaptiveMeasurement]) -> str:
    variances = ", ".join(f"{v:g}" for v in DATA_VARIANCES)
    lines = [
        f"| `{m.solver.name}` | {c.rtol:g} | {c.nfe} | {c.accepted} | {c.rejected} | {c.error:.1e} |"
        for m in measured
        for c in m.costs
    ]
    what = [f"- `{m.solver.name}`{'' if m.ok else ' **fails**'}: {m.solver.summary}" for m in measured]
    return ADAPTIVE.format(elements=ELEMENTS, variances=variances) + "\n".join((*lines, "", *what))


def _line(m: Measurement) -> str:
    bias = next(b for b in m.bias if b.budget == 20)
    error = "two steps cost more" if bias.error is None else _percent(bias.error)
    verdict = "" if m.ok else " **fails**"
    return f"| `{m.solver.name}` | {m.solver.order} | {m.order:.2f}{verdict} | {error} | {_cost(m)} |"


def _cost(m: Measurement) -> str:
    noise = "draws" if m.draws else "deterministic"
    summary = m.solver.summary
    for character in "\\|*<":
        summary = summary.replace(character, "\\" + character)
    return f"{m.registers} | {m.width[0]}, {m.width[1]} | {noise} | {summary}"


def _note(m: Measurement) -> str:
    promised, why = PROMISED[m.solver.name]
    return f"- `{m.solver.name}`: {promised} is promised, {m.order:.2f} measured: {why}."


def _percent(error: float) -> str:
    """Two digits, as a percentage."""
    return f"{100.0 * error:+.2g}%" if abs(error) < 1.0 else f"{100.0 * error:+.0f}%"
