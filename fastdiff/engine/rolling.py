"""A rolling window over the frames of a video, each at a noise level of its own.

May import: arguments, stream, compiler, models.denoiser. FIFO-Diffusion (Kim et al. 2024, Alg. 1): a queue of as many
frames as there are rows; in every step the network sees all of them at once, the oldest the cleanest, each takes one
row of the plan, the oldest leaves as a finished frame and a new one joins as noise. It is a stream whose batch is the
window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from fastdiff.compiler.build import plan as build_plan
from fastdiff.compiler.plan import Plan
from fastdiff.engine.arguments import settle_guidance
from fastdiff.engine.stream import Stream
from fastdiff.models.denoiser import Condition, Denoiser


def rolling(
    model: Denoiser,
    shape: Sequence[int],
    solver: str = "ddim",
    steps: int = 16,
    grid: str = "karras",
    *,
    seed: int = 0,
    clip: Tensor | None = None,
    cond: Condition = None,
    uncond: Condition = None,
    guidance: float | None = None,
    backend: str = "auto",
    graph: bool | str = "auto",
    **options: Any,
) -> Iterator[Tensor]:
    """The frames of a video without end, fp32 [*S] each, one for every evaluation of the network.

    The network is called on the window: x [n, *S] and t [n], the oldest frame first, n = the rows of the plan. shape:
    [*S] of a frame. Frame f has seed + f. clip: [n - 1, *S], frames to begin with, the oldest first, each noised to the
    level of its place; without it the window grows from one frame to n. cond, uncond: of one frame, the same for all,
    with a batch of one. guidance: as in `Sampler.sample`. Raises ValueError for a solver that evaluates more than once
    in a step, for a clip that does not fill the window and for uncond without guidance.
    """
    plans = [build_plan(solver, model.schedule, steps, grid, start_step=k, **options) for k in range(steps)]
    window = plans[0].nfe
    if [plan.nfe for plan in plans] != list(range(steps, 0, -1)):
        raise ValueError(
            f"rolling: {solver} does not evaluate the network once per step, so frames would not move on together; "
            "take one that does: ddim, ddpm, euler, euler_ancestral, dpmpp_2m"
        )
    if clip is not None and tuple(clip.shape) != (window - 1, *shape):
        raise ValueError(
            f"rolling: clip must hold the {window - 1} frames that follow each other in a window of {window}, shape "
            f"{(window - 1, *shape)}, got {tuple(clip.shape)}"
        )
    weight = settle_guidance(guidance, uncond, plans[0].reads_unguided)
    asked: dict[str, Any] = {"cond": cond, "uncond": uncond, "guidance": weight}
    stream = Stream(model, shape, window, backend=backend, graph=graph, in_order=True)
    for k, image in enumerate(() if clip is None else clip):
        stream.submit(plans[window - 1 - k], seed=seed + k, init=image, opening="image", **asked)
    return _frames(stream, plans[0], seed + (0 if clip is None else window - 1), asked)


def _frames(stream: Stream, plan: Plan, seed: int, asked: dict[str, Any]) -> Iterator[Tensor]:
    with stream:
        while True:
            stream.submit(plan, seed=seed, **asked)
            seed += 1
            for request in stream.step():
                yield request.result()
