"""A mix of requests with other steps each: streamed, in batches of equal plans, and one after the other.

All requests are there at the start, so latency is the time until a request's own sample is there, waiting included.
Batches are what a server does that cannot mix plans: requests of one plan together, in the order they came. Every
contender draws the same samples, which is checked.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff as fd
from bench import loop, measure, peers
from bench.measure import Task

SLOTS = (4, 16)
REQUESTS = 48
MIX = (("dpmpp_2m", 8), ("ddim", 20), ("euler_ancestral", 12), ("dpmpp_2m", 30), ("ddim", 5), ("heun", 6))
TOLERANCE = 1e-3  # of the largest pixel: networks round otherwise in batches of another size
CONTENDERS = ("stream", "batched", "alone")


@dataclass(frozen=True)
class Ask:
    """One request of the mix."""

    plan: fd.Plan
    seed: int
    cond: dict[str, int]


Drawn = list[tuple[Tensor, float]]  # per request its sample and the seconds until it was there


def run(device: torch.device, quick: bool) -> Iterator[dict[str, Any]]:
    """Measure every network and number of slots, one line at a time."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, net, sample, cond in loop.networks(quick):
            for slots in SLOTS[:1] if quick else SLOTS:
                yield _case(name, net.eval().to(device), sample, cond, slots, device, quick)


def _case(
    name: str,
    net: nn.Module,
    sample: tuple[int, ...],
    cond: dict[str, int],
    slots: int,
    device: torch.device,
    quick: bool,
) -> dict[str, Any]:
    watch = measure.Watch()
    schedule = fd.schedules.linear(peers.TRAINED, *peers.BETAS)
    model = fd.Denoiser(net, schedule, "eps", device=device)
    plans = [fd.plan(solver, schedule, steps, "trailing") for solver, steps in MIX]
    asks = [Ask(plans[i % len(plans)], i, cond) for i in range(12 if quick else REQUESTS)]
    stream = fd.stream(model, sample, slots, queue=len(asks))
    samplers = {id(plan): fd.Sampler(plan, model) for plan in plans}
    ways: dict[str, Callable[[], Drawn]] = {
        "stream": lambda: _streamed(stream, asks, device),
        "batched": lambda: _batched(samplers, asks, sample, slots, device),
        "alone": lambda: _batched(samplers, asks, sample, 1, device),
    }
    first = {key: way() for key, way in ways.items()}
    scale = max(float(image.abs().max()) for image, _ in first["alone"])
    error = max(
        float((image - other).abs().max())
        for key in CONTENDERS[:2]
        for (image, _), (other, _) in zip(first[key], first["alone"], strict=True)
    )
    line: dict[str, Any] = {
        "bench": "stream",
        "network": name,
        "solver": "mix",
        "steps": sum(plan.nfe for plan in plans) / len(plans),
        "batch": slots,
        "shape": "x".join(map(str, sample)),
        "executor": stream.backend,
        "gate": "green" if error <= TOLERANCE * scale else "red",
        "error": error,
        "tolerance": TOLERANCE * scale,
    }
    if line["gate"] == "red":
        return line
    latencies: dict[str, list[Tensor]] = {key: [] for key in ways}

    def task(key: str) -> Task:
        def timed() -> None:
            latencies[key].append(torch.tensor([seconds for _, seconds in ways[key]()], dtype=torch.float64))

        return Task(timed, 1)

    timings = measure.interleave(
        {key: task(key) for key in ways}, device, 0.3 if quick else 12.0, least=3, most=100, warm_up=1
    )
    for key, timing in timings.items():
        per_image = 1e-6 / len(asks)
        line |= {f"{key}_seconds": timing.median * per_image}
        line |= {f"{key}_seconds_p20": timing.p20 * per_image, f"{key}_seconds_p80": timing.p80 * per_image}
        for suffix, quantile in (("", 0.5), ("_p95", 0.95)):
            found = torch.stack([seconds.quantile(quantile) for seconds in latencies[key][-timing.repetitions :]])
            line[f"{key}_latency{suffix}"] = float(found.median())
    line["repetitions"] = timings["stream"].repetitions
    others = watch.others()
    return line | ({} if others is None else {"others": round(others, 3)})


def _streamed(stream: fd.Stream, asks: list[Ask], device: torch.device) -> Drawn:
    requests = [stream.submit(ask.plan, seed=ask.seed, cond=_labels([ask], device)) for ask in asks]
    for _ in stream:
        pass
    return [(request.result(), request.latency or 0.0) for request in requests]


def _batched(
    samplers: dict[int, fd.Sampler], asks: list[Ask], sample: tuple[int, ...], size: int, device: torch.device
) -> Drawn:
    """Batches of at most `size` requests of one plan, begun in the order of their first request."""
    started = time.perf_counter()
    drawn: dict[int, tuple[Tensor, float]] = {}
    for i, ask in enumerate(asks):
        if i in drawn:
            continue
        chosen = [j for j in range(i, len(asks)) if asks[j].plan is ask.plan and j not in drawn][:size]
        together = [asks[j] for j in chosen]
        images = samplers[id(ask.plan)].sample(
            (len(chosen), *sample), seed=[other.seed for other in together], cond=_labels(together, device)
        )
        now = time.perf_counter() - started
        drawn |= {j: (image, now) for j, image in zip(chosen, images, strict=True)}
    return [drawn[i] for i in range(len(asks))]


def _labels(asks: list[Ask], device: torch.device) -> dict[str, Tensor] | None:
    cond = asks[0].cond
    return {key: torch.full((len(asks),), value, device=device) for key, value in cond.items()} or None
