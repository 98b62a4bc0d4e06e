"""Where a request to a stream is checked and made ready: its plan packed, its numbers, images and conditions.

May import: request, arguments, idle, branches, guidance, seeds, compiler, models.denoiser. Nothing here runs on a
device that a batch is running on, and any thread may come.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.compiler.adaptive import AdaptivePlan
from fastdiff.compiler.brownian import on_path
from fastdiff.compiler.build import plan as build_plan
from fastdiff.compiler.guided import muted
from fastdiff.compiler.plan import Plan
from fastdiff.engine import idle
from fastdiff.engine.arguments import check_fits, number_per_sample, settle_guidance, settle_perturbation
from fastdiff.engine.branches import arrange
from fastdiff.engine.guidance import APG, Reduction
from fastdiff.engine.request import Work, needed_by
from fastdiff.engine.seeds import per_sample as seeds_of
from fastdiff.models.denoiser import Condition, Denoiser

KEPT = 256  # plans made from names, packed plans, and what their rows need

V = TypeVar("V")


class Desk:
    """plan: of requests that bring none. rows: the most that a plan may have, its opening row included."""

    def __init__(
        self,
        model: Denoiser,
        shape: torch.Size,
        plan: Plan | None,
        guide: Denoiser | None,
        perturbed: Denoiser | None,
        reduces: Reduction | None,
        rows: int,
    ) -> None:
        self._model, self._shape, self._default, self._rows = model, tuple(shape), plan, rows
        self._guide, self._perturbed, self._reduces = guide, perturbed, reduces
        self._lock = threading.Lock()
        self._memo: OrderedDict[Hashable, Any] = OrderedDict()

    def work(
        self,
        plan: Plan | str | None,
        names: Mapping[str, Any],
        seed: int | Sequence[int],
        cond: Condition,
        uncond: Condition,
        guidance: float | None,
        init: Tensor | None,
        opening: str | None,
        noise: str,
        perturbed_cond: Condition,
        perturbed_scale: float | None,
        given: Mapping[str, Tensor],
    ) -> Work:
        """The arguments of `Stream.submit` made ready. Raises ValueError or TypeError for what does not fit."""
        opening = opening or ("image" if isinstance(plan, str) else "state")
        plan = self._plan(plan, names)
        self._check(plan, noise)
        (value,) = seeds_of(seed if isinstance(seed, Sequence) else [seed], 1).tolist()
        (weight,) = number_per_sample("guidance", settle_guidance(guidance, uncond, plan.reads_unguided), 1)
        (scale,) = number_per_sample("perturbed_scale", settle_perturbation(perturbed_scale, perturbed_cond), 1)
        if isinstance(self._reduces and self._reduces.rule, APG) and scale:
            raise ValueError("rule APG projects against one branch: use it without perturbed_scale")
        idle.warn_of(plan, noise == "brownian", weight != 1.0, scale != 0.0)
        branches = arrange(
            self._model, 1, cond, uncond, perturbed_cond, guided=weight != 1.0, perturbed=scale != 0.0,
            guide=self._guide, perturbed_net=self._perturbed, reads_unguided=plan.reads_unguided,
        )  # fmt: skip
        images = self._images(plan, init, given)
        ready = self._ready(plan, noise == "brownian", "noise" if init is None else opening)
        needed = self._needed(ready[0], weight != 1.0, scale != 0.0)
        return Work(*ready, value, weight, scale, needed, branches, images.pop("init", None), images)

    def _plan(self, plan: Plan | str | None, names: Mapping[str, Any]) -> Plan:
        if isinstance(plan, str):
            name = plan

            def make() -> Plan:
                return build_plan(name, self._model.schedule, **names)

            if not all(isinstance(value, bool | int | float | str | None) for value in names.values()):
                return make()
            return self._kept((name, *((k, type(v), v) for k, v in sorted(names.items()))), make)
        if names:
            raise TypeError(f"{', '.join(names)} belong to a solver's name; a plan that is made has them already")
        if plan is None and self._default is None:
            raise TypeError("submit needs a plan or the name of a solver: this stream was opened without a plan")
        return self._default if plan is None else plan  # type: ignore[return-value]

    def _check(self, plan: Plan, noise: str) -> None:
        check_fits(plan, self._model)
        if isinstance(plan, AdaptivePlan):
            raise ValueError(
                f"{plan.solver} chooses its rows while it runs, and a stream has to know them when a request comes; "
                "run it with fd.Sampler, or take a solver with a grid"
            )
        if len(plan.rows) > self._rows:
            raise ValueError(
                f"this plan has {len(plan.rows)} rows, the stream's table {self._rows}: give the stream "
                f"table_rows={len(plan.rows)} or more"
            )
        if plan.learns_spread and not self._model.learned_variance:
            raise ValueError(
                f"{plan.solver} takes the spread of its noise from the network; wrap one that returns [B, 2C, ...] in "
                "Denoiser(..., learned_variance=True)"
            )
        if noise not in ("white", "brownian"):
            raise ValueError(
                f"the noise of a request must be 'white' or 'brownian', got {noise!r}; other noise is a table for a "
                "whole batch: run it with fd.Sampler"
            )

    def _ready(self, plan: Plan, path: bool, opening: str) -> tuple[Plan, Any, Hashable]:
        """The plan as it will run, its packed rows, and a key that is equal for equal rows."""

        def make() -> tuple[Plan, Plan, Any, Hashable]:
            own = on_path(plan) if path else plan
            own = muted(own, self._reduces.muted) if self._reduces is not None else own
            packed = own.pack(self._model.prediction, self._model.sigma_data, opening)
            digest = hashlib.blake2b(packed.coef.tobytes(), digest_size=16)
            digest.update(packed.ids.tobytes())
            return plan, own, packed, (packed.coef.shape, digest.digest())

        # the plan is kept beside its id, so that the id stays its own
        _, own, packed, key = self._kept((id(plan), path, opening), make)
        return own, packed, key

    def _needed(self, plan: Plan, guided: bool, perturbed: bool) -> tuple[tuple[int, ...], ...]:
        _, needed = self._kept((id(plan), guided, perturbed, ""), lambda: (plan, needed_by(plan, guided, perturbed)))
        return needed

    def _images(self, plan: Plan, init: Tensor | None, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if set(given) != set(plan.given):
            wanted = f"given={{{', '.join(f'{name!r}: tensor' for name in plan.given)}}}" if plan.given else "no given="
            raise ValueError(f"{plan.solver} takes {wanted}, got {', '.join(sorted(given)) or 'none'}")
        images = dict(given) | ({} if init is None else {"init": init})
        for name, image in images.items():
            if not isinstance(image, Tensor) or not image.is_floating_point():
                raise TypeError(f"{name} must be a floating-point tensor of shape {self._shape}, got {image!r}")
            if tuple(image.shape) not in (self._shape, (1, *self._shape)):
                raise ValueError(f"{name} must have shape {self._shape}, got {tuple(image.shape)}")
            if not bool(image.isfinite().all()):
                raise ValueError(f"{name} holds inf or nan; give a finite image or state")
            images[name] = image.detach().reshape(self._shape).to(self._model.device, copy=True)
        return images

    def _kept(self, key: Hashable, make: Callable[[], V]) -> V:
        """What `make` gave for this key; the least recently used goes."""
        with self._lock:
            if key not in self._memo:
                self._memo[key] = make()
                if len(self._memo) > KEPT:
                    self._memo.popitem(last=False)
            self._memo.move_to_end(key)
            found: V = self._memo[key]
            return found
