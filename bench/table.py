"""Results on disk and in README: one CSV line per case, and the tables generated from it.

The tables stand between two markers; what is around them is left alone. The same CSV gives the same text.
"""

from __future__ import annotations

import csv
import io
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff.files import write_atomically

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"

# The spread of a time stands in columns of its own.
_TIMES = (
    *("us", "emit_us", "cold_us", "copy_us", "copy_near_us", "diffusers_us", "compiled_us", "compiled_graph_us"),
    *("noise_us", "k_diffusion_us", "k_diffusion_noise_us"),
    "torch_us",
)
COLUMNS = [
    *("run", "commit", "device", "machine", "threads", "load", "python", "torch", "diffusers", "triton", "numpy"),
    *("k-diffusion", "torchsde"),
    *("driver", "sm_mhz", "memory_mhz", "watts", "watts_limit", "celsius", "throttle"),
    *("bench", "solver", "network", "steps", "batch", "shape", "elements", "model_dtype", "executor"),
    *("gate", "error", "tolerance", "diffusers_error", "diffusers_tolerance"),
    *(f"{time}{spread}" for time in _TIMES for spread in ("", "_p10", "_p20", "_p80")),
    *("bytes_per_element", "gbs", "copy_gbs", "copy_fraction", "copy_near_fraction"),
    *("ratio_diffusers", "ratio_compiled", "diffusers_page_faults"),
    *("ratio_k_diffusion", "ratio_noise", "variance", "path_correlation"),
    *("ratio_torch", "f0_fraction", "f2_fraction"),
    *(f"{k}{s}" for k in ("seconds", "diffusers_seconds") for s in ("", "_p20", "_p80", "_outside")),
    *(f"{k}_seconds{s}" for k in ("stream", "batched", "alone") for s in ("", "_p20", "_p80")),
    *(f"{k}_latency{s}" for k in ("stream", "batched", "alone") for s in ("", "_p95")),
    *("repetitions", "others", "took"),
]

Line = Mapping[str, Any]


def append(path: Path, lines: Sequence[Line]) -> None:
    """Add lines to the results, whose file gets the columns it lacks. Raises ValueError when it has others."""
    known = path.exists() and path.stat().st_size > 0
    if known and not set(_header(path)) <= set(COLUMNS):
        raise ValueError(f"{path} has other columns than this version writes; move it away and run again")
    if known and _header(path) != COLUMNS:
        with path.open(newline="") as file:
            before = list(csv.DictReader(file))
        write_atomically(path, lambda to: to.write_text(_as_csv(before), newline=""))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        if not known:
            writer.writeheader()
        writer.writerows({key: _plain(value) for key, value in line.items()} for line in lines)


def _as_csv(lines: Sequence[Line]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def update(results: Path, readme: Path) -> int:
    """Write the tables into `readme`; 0, or 1 with the reason on stderr and the file untouched."""
    if not results.exists():
        return _fail(f"{results} is not there; run: python bench/run.py ops")
    with results.open(newline="") as file:
        text = render(list(csv.DictReader(file)))
    page = readme.read_text() if readme.exists() else ""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        print(text)
        return _fail(f"{readme} has no lines {BEGIN} and {END}; put them where the tables belong")
    temporary = readme.with_name(readme.name + ".part")
    temporary.write_text(f"{head}{BEGIN}\n{text}\n{END}{tail}")
    os.replace(temporary, readme)
    print(f"{readme}: tables of {len(text.splitlines())} lines")
    return 0


def render(lines: Iterable[Line]) -> str:
    """The tables as Markdown: the latest run of each benchmark on each machine, CPUs first."""
    groups: dict[tuple[str, str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["bench"], line["device"], line["machine"], line["threads"]), []).append(line)
    parts = []
    for bench, (about, tabulate) in _TABLES.items():
        found = sorted(key for key in groups if key[0] == bench)
        parts += [about] if found else []
        for key in found:
            latest = max(line["run"] for line in groups[key])
            chosen = [line for line in groups[key] if line["run"] == latest]
            parts += [heading(chosen[0]), tabulate(chosen)]
    return "\n\n".join(parts)


def heading(facts: Line) -> str:
    """Where and with what a run was made, in one line."""
    where = f"{facts['machine']}, {facts['threads']} threads" if facts["device"] == "cpu" else facts["machine"]
    driver = f", driver {facts['driver']}" if facts.get("driver") else ""
    peer = facts["diffusers"] or "not installed"
    return (
        f"**{where}**: torch {facts['torch']}, diffusers {peer}{driver}, commit {facts['commit']}, "
        f"load {facts['load']}, {str(facts['run'])[:10]}"
    )


def show_ops(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'sampler':<16}{'shape':<16}{'dtype':<9}{'executor':<10}{'us [p20-p80]':<22}{'+input':>8}"
            f"{'diffusers us':>30}{'compiled us':>30}{'x diff':>8}{'x comp':>8}{'B/el':>5}{'GB/s':>8}{'of copy':>12}"
            f"{'error':>10}{'allowed':>10}{'vs diff.':>10}{'allowed':>10}"
        )
    case = f"{line['solver']:<16}{line['shape']:<16}{line['model_dtype']:<9}{line['executor']:<10}"
    gate = "".join(f"{line[key]:>10.1e}" for key in ("error", "tolerance", "diffusers_error", "diffusers_tolerance"))
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{_spread(line, 'us'):<22}{_short(line['emit_us']):>8}{_spread(line, 'diffusers_us'):>30}"
        f"{_spread(line, _compiled(line)):>30}{_number(line, 'ratio_diffusers', 1):>8}{line['ratio_compiled']:>8.2f}"
        f"{line['bytes_per_element']:>5}{line['gbs']:>8.1f}{_of_copy(line):>12}{gate}"
    )


def show_loop(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'network':<14}{'sampler':<16}{'batch':>5}{'ms/image [p20-p80]':>28}{'diffusers':>28}{'ratio':>7}"
            f"{'outside net':>12}{'diffusers':>11}{'error':>10}{'allowed':>10}"
        )
    case = f"{line['network']:<14}{line['solver']:<16}{line['batch']:>5}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{_spread(line, 'seconds', 1e3):>28}{_spread(line, 'diffusers_seconds', 1e3):>28}"
        f"{line['ratio_diffusers']:>7.2f}{_share(line, 'seconds_outside'):>12}"
        f"{_share(line, 'diffusers_seconds_outside'):>11}{gate}"
    )


def show_stream(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        head = f"{'network':<14}{'slots':>6}"
        head += "".join(f"{f'{way} ms/image [p20-p80]':>34}{'latency s':>11}{'p95':>8}" for way in _WAYS)
        return head + f"{'error':>10}{'allowed':>10}"
    case = f"{line['network']:<14}{line['batch']:>6}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    for way in _WAYS:
        latency, late = (float(line[f"{way}_latency{suffix}"]) for suffix in ("", "_p95"))
        case += f"{_spread(line, f'{way}_seconds', 1e3):>34}{latency:>11.3f}{late:>8.3f}"
    return case + gate


def show_brownian(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'sampler':<16}{'shape':<16}{'executor':<10}{'us [p20-p80]':>24}{'k-diffusion us':>34}{'x':>8}"
            f"{'noise us':>24}{'k-diffusion us':>34}{'x':>8}{'error':>10}{'allowed':>10}"
            f"{'variance':>10}{'one path':>10}"
        )
    case = f"{line['solver']:<16}{line['shape']:<16}{line['executor']:<10}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}{line['variance']:>10.4f}{line['path_correlation']:>10.4f}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{_spread(line, 'us'):>24}{_spread(line, 'k_diffusion_us'):>34}{line['ratio_k_diffusion']:>8.1f}"
        f"{_spread(line, 'noise_us'):>24}{_spread(line, 'k_diffusion_noise_us'):>34}{line['ratio_noise']:>8.1f}{gate}"
    )


def show_pipelines(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'pipeline':<34}{'scheduler':<34}{'outside, us/step [p20-p80]':>30}{'before':>30}{'x':>7}"
            f"{'call ms [p20-p80]':>26}{'before':>26}{'x':>7}{'error':>10}{'allowed':>10}"
        )
    case = f"{line['network']:<34}{line['solver']:<34}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{_spread(line, 'us'):>30}{_spread(line, 'diffusers_us'):>30}{_number(line, 'ratio_diffusers', 1):>7}"
        f"{_spread(line, 'seconds', 1e3):>26}{_spread(line, 'diffusers_seconds', 1e3):>26}{_whole(line):>7}{gate}"
    )


def show_train(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'network':<14}{'part':<18}{'batch':>5}{'ms/image [p20-p80]':>28}{'diffusers':>28}{'ratio':>7}"
            f"{'images/s':>10}{'MB/image':>10}{'error':>10}{'allowed':>10}"
        )
    case = f"{line['network']:<14}{line['solver']:<18}{line['batch']:>5}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{_spread(line, 'seconds', 1e3):>28}{_spread(line, 'diffusers_seconds', 1e3):>28}"
        f"{line['ratio_diffusers']:>7.2f}{_rate(line):>10}{_megabytes(line):>10}{gate}"
    )


def show_train_ops(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'shape':<16}{'executor':<10}{'us [p20-p80]':>24}{'kernels us':>24}{'diffusers us':>28}"
            f"{'compiled us':>28}{'x diff':>8}{'x comp':>8}{'B/el':>10}"
            f"{'error':>10}{'allowed':>10}{'vs diff.':>10}{'allowed':>10}"
        )
    case = f"{line['shape']:<16}{line['executor']:<10}"
    gate = "".join(f"{line[key]:>10.1e}" for key in ("error", "tolerance", "diffusers_error", "diffusers_tolerance"))
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{_spread(line, 'us'):>24}{_spread(line, 'emit_us'):>24}{_spread(line, 'diffusers_us'):>28}"
        f"{_spread(line, 'compiled_us'):>28}{_number(line, 'ratio_diffusers', 1):>8}"
        f"{_number(line, 'ratio_compiled', 2):>8}{line['bytes_per_element']:>10}{gate}"
    )


def show_norm(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'network':<14}{'shape':<18}{'dtype':<9}{'executor':<10}{'us [p20-p80]':>24}{'torch us':>26}"
            f"{'compiled us':>26}{'x torch':>8}{'x comp':>8}{'GB/s':>8}{'of copy':>8}{'error':>10}{'allowed':>10}"
        )
    case = f"{line['network']:<14}{line['shape']:<18}{line['model_dtype']:<9}{line['executor']:<10}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{_spread(line, 'us'):>24}{_spread(line, 'torch_us'):>26}{_spread(line, 'compiled_us'):>26}"
        f"{line['ratio_torch']:>8.2f}{_number(line, 'ratio_compiled', 2):>8}{line['gbs']:>8.0f}"
        f"{_share(line, 'copy_fraction'):>8}{gate}"
    )


def show_unet(line: Line | None) -> str:
    """One line on the terminal; None gives the header."""
    if line is None:
        return (
            f"{'network':<14}{'batch':>5} {'dtype':<9}{'contender':<26}{'ms [p20-p80]':>24}{'x diffusers':>12}"
            f"{'of F0':>8}{'of F2':>8}{'compiled in s':>14}{'error':>10}{'allowed':>10}"
        )
    case = f"{line['network']:<14}{line['batch']:>5} {line['model_dtype']:<9}{line['executor']:<26}"
    gate = f"{line['error']:>10.1e}{line['tolerance']:>10.1e}"
    if line["gate"] == "red":
        return f"{case}WRONG: no figure {gate}"
    return (
        f"{case}{_spread(line, 'us', 1e-3):>24}{line['ratio_diffusers']:>12.2f}{_share(line, 'f0_fraction'):>8}"
        f"{_share(line, 'f2_fraction'):>8}{_number(line, 'took', 1):>14}{gate}"
    )


_WAYS = ("stream", "batched", "alone")
LINES: dict[str, Callable[[Line | None], str]] = {
    "ops": show_ops,
    "loop": show_loop,
    "brownian": show_brownian,
    "pipelines": show_pipelines,
    "stream": show_stream,
    "train": show_train,
    "train-ops": show_train_ops,
    "norm": show_norm,
    "unet": show_unet,
}

_OPS_ABOUT = (
    "The step alone, network excluded: `python bench/run.py ops`. Median µs of one step [20 % to 80 % quantile] over "
    "rows 6 to 15 of a 20-step run, all contenders in turn in one process with the same threads.\n\n"
    "- *compiled*: the same row under `torch.compile`, in place, with its own noise (on a GPU under a CUDA graph where "
    "that is faster).\n"
    "- *of copy*: bytes read plus bytes written in a second, over those of torch's `copy_`. On a CPU two copies are "
    "timed in the same turn: one that moves as many bytes / one that takes as much memory. A step works in place, so "
    "it may fit a cache that the first copy does not. On a GPU the copy is of 2 GiB.\n"
    "- With noise, while the tensors fit in cache, the limit is the arithmetic of the normals.\n"
    "- Eager code on a CPU touches fresh pages for large temporaries in every step, which can take most of its time "
    "(`diffusers_page_faults` in `bench/results.csv`); the largest ratios are that.\n"
    "- *error*: largest difference from float64 / what is allowed; a wrong result prints no figure. 16 steps of each "
    "sampler are also held against diffusers' own states (`diffusers_error`)."
)
_LOOP_ABOUT = (
    "Whole runs of 20 steps, network included: `python bench/run.py loop`. Median ms per image. *outside*: share of "
    "the time not spent in the network; the rest is the network's, and no sampler makes that faster. *tiny*: three "
    "3x3 convolutions of 16 channels."
)
_STEP_ABOUT = (
    "Whole training steps, network included: `python bench/run.py train`. Median ms per image of the trainer's step "
    "and of diffusers' unconditional training example's, same network, weights and precision, with AdamW and an "
    "average; then the optimizer and the average alone. *MB/image*: what the forward pass keeps for the backward "
    "pass. *error*: of the gradient, of its largest entry / what is allowed."
)
_BROWNIAN_ABOUT = (
    "Brownian noise: `python bench/run.py brownian`. Median µs of a whole step of `dpmpp_2m_sde`, network excluded, "
    "against k-diffusion's function with its Brownian tree, and of the noise alone. Both draw each increment for the "
    "first time. *error*: largest relative difference of the states when both are given the same normals / what is "
    "allowed. *variance*: of our increments and their sums, the furthest from 1, over 262,144 numbers. *one path*: "
    "correlation of a seed's whole path in 10 and in 40 steps."
)

_NORM_ABOUT = (
    "Group normalisation with SiLU, channels_last, on every shape of the UNets: `python bench/run.py norm`. Median µs, "
    "all contenders in turn. *of copy*: one read and one write of the image in a second, over torch's `copy_`. "
    "*error*: largest difference from float64 / twice torch's own."
)
_UNET_ABOUT = (
    "One forward pass of a UNet: `python bench/run.py unet`. Median ms, all contenders in turn, the same random "
    "weights; *last*: channels_last; *fast*: `net.fast()` with the times of a plan prepared. *× diffusers*: against "
    "its faster eager form. *of F0*: the network's operations at the rate of a large matrix product; *of F2*: each of "
    "the fast form's kernels at its own limit, without gaps. *error*: against float64 / twice diffusers' own."
)


_PIPELINES_ABOUT = (
    "diffusers' pipelines with tiny random components, 20 steps, before and after `accelerate(pipe)`: `python "
    "bench/run.py pipelines`. *outside*: median µs of a step that are not the network's, from the beginning of the "
    "denoising loop to its end, drawing included. *call*: the whole call in ms, with all that comes before and after "
    "the loop, the picture's decoding left out. *error*: largest difference of the pictures / what is allowed."
)
_STREAM_ABOUT = (
    "Requests of many plans (5 to 30 steps, four samplers), all there at the start: `python bench/run.py stream`. In "
    "one running batch (*stream*), in batches of equal plans in the order they came (*batched*), one by one (*alone*). "
    "ms per image, and seconds until a request's own sample is there: median / 95 %. All three draw the same samples."
)


_TRAIN_ABOUT = (
    "Noising and loss of a training step, forward and backward, network excluded: `python bench/run.py train-ops`. "
    "Median µs of the DDPM objective as the trainer calls it, and of its two kernels alone, against the four lines of "
    "diffusers' training example (`randn_like`, `randint`, `add_noise`, `mse_loss`) and the same formulas under "
    "`torch.compile`. *B/element*: what our kernels / the operators of the four lines read and write. *error*: of "
    "input, loss and gradient from float64 / what is allowed."
)


def _ops_table(lines: Sequence[Line]) -> str:
    gpu = lines[0]["device"] == "cuda"
    kind = ["network output", "kernel"] if gpu else []
    cold = ["µs, cold cache"] if gpu else []
    head = ["sampler", "shape", *kind, "fastdiff µs", *cold, "diffusers µs", "compiled µs", "× diffusers", "× compiled"]
    head += ["B/element", "GB/s", "of copy", "with next input, µs", "error / allowed"]
    body = []
    for line in lines:
        body.append(
            [
                line["solver"],
                line["shape"].replace("x", "×"),
                *([line["model_dtype"], line["executor"]] if gpu else []),
                _spread(line, "us"),
                *([_short(float(line["cold_us"]))] if gpu else []),
                _spread(line, "diffusers_us"),
                _spread(line, _compiled(line)),
                _number(line, "ratio_diffusers", 1),
                _number(line, "ratio_compiled", 2),
                str(line["bytes_per_element"]),
                _short(float(line["gbs"])),
                _of_copy(line),
                _short(float(line["emit_us"])),
                f"{float(line['error']):.0e} / {float(line['tolerance']):.0e}",
            ]
        )
    return _markdown(head, body, 4 if gpu else 2)


def _loop_table(lines: Sequence[Line]) -> str:
    head = ["network", "sampler", "batch", "fastdiff", "diffusers", "ratio", "outside", "outside, diffusers", ""]
    body = []
    for line in lines:
        share = line["diffusers_seconds_outside"]
        small = share != "" and float(share) < 0.1
        body.append(
            [
                line["network"],
                line["solver"],
                str(line["batch"]),
                _spread(line, "seconds", 1e3),
                _spread(line, "diffusers_seconds", 1e3),
                f"{float(line['ratio_diffusers']):.2f}",
                _share(line, "seconds_outside"),
                _share(line, "diffusers_seconds_outside"),
                "the network dominates" if small else "",
            ]
        )
    return _markdown(head, body, 2)


def _train_table(lines: Sequence[Line]) -> str:
    head = ["network", "part", "batch", "fastdiff", "diffusers", "ratio", "images/s", "MB/image", "error / allowed"]
    body = [
        [
            line["network"],
            line["solver"],
            str(line["batch"]),
            _spread(line, "seconds", 1e3),
            _spread(line, "diffusers_seconds", 1e3),
            _number(line, "ratio_diffusers", 2),
            _rate(line),
            _megabytes(line),
            f"{float(line['error']):.0e} / {float(line['tolerance']):.0e}",
        ]
        for line in lines
        if line["gate"] != "red"
    ]
    return _markdown(head, body, 2)


def _rate(line: Line) -> str:
    return f"{1 / float(line['seconds']):,.1f}" if line["solver"] == "step" else "–"


def _megabytes(line: Line) -> str:
    if line["solver"] != "step":
        return "–"
    return f"{float(line['bytes_per_element']) * float(line['elements']) / float(line['batch']) / 1e6:.1f}"


def _brownian_table(lines: Sequence[Line]) -> str:
    head = ["sampler", "shape", "kernel", "fastdiff µs", "k-diffusion µs", "× k-diffusion", "noise alone µs"]
    head += ["k-diffusion's µs", "× k-diffusion", "error / allowed", "variance", "one path"]
    body = [
        [
            line["solver"],
            line["shape"].replace("x", "×"),
            line["executor"],
            _spread(line, "us"),
            _spread(line, "k_diffusion_us"),
            f"{float(line['ratio_k_diffusion']):.1f}",
            _spread(line, "noise_us"),
            _spread(line, "k_diffusion_noise_us"),
            f"{float(line['ratio_noise']):.1f}",
            f"{float(line['error']):.0e} / {float(line['tolerance']):.0e}",
            f"{float(line['variance']):.4f}",
            f"{float(line['path_correlation']):.4f}",
        ]
        for line in lines
    ]
    return _markdown(head, body, 3)


def _norm_table(lines: Sequence[Line]) -> str:
    head = ["network", "shape", "network output", "kernel", "fastdiff µs", "torch µs", "compiled µs", "× torch"]
    head += ["GB/s", "of copy", "error / allowed"]
    body = [
        [
            line["network"],
            line["shape"].replace("x", "×"),
            line["model_dtype"],
            line["executor"],
            *(_spread(line, key) for key in ("us", "torch_us", "compiled_us")),
            _number(line, "ratio_torch", 2),
            _short(float(line["gbs"])),
            f"{float(line['copy_fraction']):.0%}",
            f"{float(line['error']):.0e} / {float(line['tolerance']):.0e}",
        ]
        for line in lines
    ]
    return _markdown(head, body, 4)


def _unet_table(lines: Sequence[Line]) -> str:
    head = ["network", "dtype", "contender", "batch", "ms", "× diffusers", "of F0", "of F2", "compiled in s"]
    head += ["error / allowed"]
    body = [
        [
            line["network"],
            line["model_dtype"],
            line["executor"],
            str(line["batch"]),
            _spread(line, "us", 1e-3),
            _number(line, "ratio_diffusers", 2),
            _share(line, "f0_fraction"),
            _share(line, "f2_fraction"),
            _number(line, "took", 0),
            f"{float(line['error']):.0e} / {float(line['tolerance']):.0e}",
        ]
        for line in lines
    ]
    return _markdown(head, body, 3)


def _pipelines_table(lines: Sequence[Line]) -> str:
    head = ["pipeline", "scheduler", "outside", "outside, before", "ratio", "call", "call, before", "ratio"]
    head += ["error / allowed"]
    body = [
        [
            line["network"],
            line["solver"],
            _spread(line, "us"),
            _spread(line, "diffusers_us"),
            _number(line, "ratio_diffusers", 1),
            _spread(line, "seconds", 1e3),
            _spread(line, "diffusers_seconds", 1e3),
            _whole(line),
            f"{float(line['error']):.0e} / {float(line['tolerance']):.0e}",
        ]
        for line in lines
    ]
    return _markdown(head, body, 2)


def _stream_table(lines: Sequence[Line]) -> str:
    head = ["network", "slots"]
    head += [f"{way} {what}" for way in _WAYS for what in ("ms/image", "latency")]
    body = []
    for line in lines:
        cells = [line["network"], str(line["batch"])]
        for way in _WAYS:
            latency, late = (float(line[f"{way}_latency{suffix}"]) for suffix in ("", "_p95"))
            cells += [_spread(line, f"{way}_seconds", 1e3), f"{_short(latency)} / {_short(late)}"]
        body.append(cells)
    return _markdown(head, body, 1)


def _train_ops_table(lines: Sequence[Line]) -> str:
    head = ["shape", "kernel", "fastdiff µs", "kernels µs", "diffusers µs", "compiled µs", "× diffusers", "× compiled"]
    head += ["B/element", "error / allowed"]
    body = [
        [
            line["shape"].replace("x", "×"),
            line["executor"],
            *(_spread(line, key) for key in ("us", "emit_us", "diffusers_us", "compiled_us")),
            _number(line, "ratio_diffusers", 1),
            _number(line, "ratio_compiled", 2),
            str(line["bytes_per_element"]),
            f"{float(line['error']):.0e} / {float(line['tolerance']):.0e}",
        ]
        for line in lines
    ]
    return _markdown(head, body, 2)


_TABLES: dict[str, tuple[str, Callable[[Sequence[Line]], str]]] = {
    "ops": (_OPS_ABOUT, _ops_table),
    "brownian": (_BROWNIAN_ABOUT, _brownian_table),
    "loop": (_LOOP_ABOUT, _loop_table),
    "pipelines": (_PIPELINES_ABOUT, _pipelines_table),
    "stream": (_STREAM_ABOUT, _stream_table),
    "train": (_STEP_ABOUT, _train_table),
    "train-ops": (_TRAIN_ABOUT, _train_ops_table),
    "norm": (_NORM_ABOUT, _norm_table),
    "unet": (_UNET_ABOUT, _unet_table),
}


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]], words: int) -> str:
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *body])


def _of_copy(line: Line) -> str:
    both = (line.get(key, "") for key in ("copy_fraction", "copy_near_fraction"))
    return " / ".join(f"{float(value):.0%}" for value in both if value != "")


def _compiled(line: Line) -> str:
    """The column of the compiled formula's better way of being launched."""
    graph = line.get("compiled_graph_us", "")
    return "compiled_graph_us" if graph != "" and float(graph) < float(line["compiled_us"]) else "compiled_us"


def _whole(line: Line) -> str:
    """Of a whole call: the time before over the time now."""
    return f"{float(line['diffusers_seconds']) / float(line['seconds']):.2f}"


def _number(line: Line, key: str, digits: int) -> str:
    value = line.get(key, "")
    return "–" if value == "" else f"{float(value):.{digits}f}"


def _spread(line: Line, key: str, scale: float = 1.0) -> str:
    if line.get(key, "") == "":
        return "–"
    median, low, high = (float(line[k]) * scale for k in (key, f"{key}_p20", f"{key}_p80"))
    return f"{_short(median)} [{_short(low)}–{_short(high)}]"


def _share(line: Line, key: str) -> str:
    value = line.get(key, "")
    return "" if value == "" else f"{float(value):.1%}"


def _short(value: float) -> str:
    """Three significant digits, no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _plain(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _fail(why: str) -> int:
    print(why, file=sys.stderr)
    return 1
