"""Writes docs/capture.md: what `fd.capture` makes of every scheduler class of the diffusers that is installed.

python docs/capture_table.py            # write docs/capture.md
python docs/capture_table.py --print    # print it instead
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
import warnings
from pathlib import Path
from typing import Any

import fastdiff as fd

STEPS = 20
TARGET = Path(__file__).with_name("capture.md")

# What a class cannot be made or run without, and more configurations worth a line.
# Each: the arguments of its constructor, of set_timesteps and of step.
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
DEFAULT: Case = ({}, {}, {})
CLIP_OFF: Case = ({"clip_sample": False}, {}, {})
FLOW: Case = ({"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, {}, {})
CASES: dict[str, list[Case]] = {
    "AmusedScheduler": [({"mask_token_id": 5}, {}, {})],
    "ConsistencyDecoderScheduler": [({}, {"steps": 2}, {})],
    "DDIMInverseScheduler": [DEFAULT, CLIP_OFF],
    "DDIMParallelScheduler": [DEFAULT, CLIP_OFF],
    "DDIMScheduler": [DEFAULT, CLIP_OFF, ({}, {}, {"use_clipped_model_output": True}), (*CLIP_OFF[:2], {"eta": 1.0})],
    "DDPMScheduler": [
        DEFAULT,
        CLIP_OFF,
        ({"clip_sample": False, "thresholding": True, "sample_max_value": 2.0}, {}, {}),
        ({"variance_type": "learned_range"}, {}, {}),
    ],
    "DPMSolverMultistepScheduler": [
        DEFAULT,
        ({"solver_order": 3}, {}, {}),
        ({"algorithm_type": "sde-dpmsolver++"}, {}, {}),
        FLOW,
    ],
    "EulerDiscreteScheduler": [DEFAULT, ({}, {}, {"s_churn": 3.0})],
    "FlowMatchEulerDiscreteScheduler": [DEFAULT, ({"stochastic_sampling": True}, {}, {})],
    "HeliosScheduler": [({"stages": 1}, {}, {}), ({}, {"stage_index": 0}, {})],
    "HeliosDMDScheduler": [({"stages": 1}, {}, {})],
    "PNDMScheduler": [DEFAULT, ({"skip_prk_steps": True}, {}, {})],
    "RFD4ProteinaScheduler": [
        ({"schedule_mode": "power", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 0.0}, {}, {}),
    ],
    "SASolverScheduler": [DEFAULT, ({"predictor_order": 3, "corrector_order": 4}, {}, {})],
    "SCMScheduler": [({}, {"intermediate_timesteps": None}, {})],
    "UniPCMultistepScheduler": [DEFAULT, ({"solver_order": 3}, {}, {}), FLOW],
    "VQDiffusionScheduler": [({"num_vec_classes": 10}, {}, {})],
}

HEADER = """# Schedulers that `fd.capture` compiles

Made by `python docs/capture_table.py` with diffusers {version}: every scheduler class, {steps} steps where the
configuration does not say otherwise.

```python
plan = fd.capture(scheduler, steps=20)  # any object with set_timesteps, timesteps and step
plan = fd.capture(scheduler, 20, step_options={{"eta": 1.0}})
model = fd.Denoiser(unet, "linear", prediction="eps")  # the prediction the scheduler's config names
images = fd.Sampler(plan, model).sample((4, 3, 32, 32))
```

`fd.capture(scheduler, steps)` runs a scheduler object, unmodified, on basis vectors and gives its table; a second run
on random tensors is compared with the table, state by state. *Mismatch* is the largest relative difference there: about
1e-15 where the scheduler computes in the dtype it is given, about 1e-7 where it casts or draws in float32.
*Registers* is what the table keeps in memory; *width* is the most outputs and inputs of one row (the kernel has 3 and
6; the model output and the noise are not counted). A class that is refused says why. `DPMSolverSDEScheduler` and
`CosineDPMSolverMultistepScheduler` draw from a Brownian tree; their tables draw independent normals instead.
Every draw is given the levels it covers, so `noise="brownian"` puts any of them on our own path.

| Scheduler | Configuration | Evaluations | Registers | Width | Draws | Arithmetic | Mismatch | Outcome |
|---|---|---|---|---|---|---|---|---|
"""


def classes() -> dict[str, Any]:
    """Every scheduler class of diffusers by name, those included that it does not export."""
    import diffusers.schedulers as package

    found = {}
    for module_info in pkgutil.iter_modules(package.__path__):
        if not module_info.name.startswith("scheduling_"):
            continue
        module = importlib.import_module(f"{package.__name__}.{module_info.name}")
        for name, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__ and name.endswith("Scheduler"):
                found[name] = value
    return dict(sorted(found.items()))


def line(name: str, scheduler: Any, case: Case) -> str:
    """One row of the table."""
    config, timesteps, options = case
    shown = ", ".join(f"{key}={value}" for key, value in {**config, **timesteps, **options}.items()) or "default"
    try:
        plan = fd.capture(scheduler(**config), **{"steps": STEPS, **timesteps}, step_options=options)
    except (TypeError, ValueError, RuntimeError) as refused:
        reason = " ".join(str(refused).split()).replace("|", "\\|")
        reason = reason.removeprefix(f"{name}.").removeprefix(f"{name}, ").removeprefix(f"{name} ")
        return f"| {name} | {shown} | | | | | | | refused: {reason} |"
    width = max(len(row.outputs) for row in plan.rows), max(len(row.slots) + 1 for row in plan.rows)
    clamped = " with clamp" if any(row.clamp for row in plan.rows) else ""
    return (
        f"| {name} | {shown} | {plan.nfe} | {plan.registers} | {width[0]}, {width[1]} | {plan.draws} | "
        f"{plan.options['precision']} | {plan.options['mismatch']:.0e} | ok{clamped} |"
    )


def table() -> str:
    """The whole page."""
    import diffusers

    lines = [line(name, kind, case) for name, kind in classes().items() for case in CASES.get(name, [DEFAULT])]
    return HEADER.format(version=diffusers.__version__, steps=STEPS) + "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print", action="store_true", dest="show", help="print the page instead of writing it")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.show:
        print(table())
    else:
        TARGET.write_text(table())
        print(f"wrote {TARGET}")


if __name__ == "__main__":
    main()
