"""What other libraries call our solvers, for the error that an unknown name gets. May import: nothing of the package.

Their names are k-diffusion's functions, diffusers' classes and the menus of web user interfaces. They are compared in
small letters without punctuation, "++" as "pp", and without a grid's name at the end, which is an argument here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_GRIDS = ("karras", "exponential", "beta")
# diffusers' DPM-Solver classes are DPM-Solver++ unless told otherwise
_THEIRS = {
    "ddimcfgpp": "'ddim', cfg_pp=True",
    "dpm2a": "'dpm_2_ancestral'",
    "dpmpp2msdeheun": "'dpmpp_2m_sde', correction='heun'",
    "dpmpp2sa": "'dpmpp_2s_ancestral'",
    "dpmsolvermultistep": "'dpmpp_2m'",
    "dpmsolverpp": "'dpmpp_2m'",
    "dpmsolversde": "'dpmpp_sde'",
    "dpmsolversinglestep": "'dpmpp_2s'",
    "edmdpmsolvermultistep": "'dpmpp_2m'",
    "edmeuler": "'euler'",
    "eulera": "'euler_ancestral'",
    "flowmatcheulerdiscrete": "'flow_euler'",
    "flowmatchheundiscrete": "'flow_heun'",
    "plms": "'pndm', warmup='plms'",
    "unipcbh2": "'unipc'",
}


def meant(name: object, ours: Iterable[str]) -> str:
    """A sentence that says which of our solvers another library's name stands for; "" where none is known."""
    plain = re.sub(r"[^a-z0-9]", "", str(name).lower().replace("++", "pp")).removesuffix("scheduler")
    grid = next((grid for grid in _GRIDS if plain.endswith(grid)), "")
    plain = plain.removesuffix(grid).removesuffix("gpu")
    known = {solver.replace("_", ""): repr(solver) for solver in ours} | _THEIRS
    bare = [plain, plain.removesuffix("discrete"), plain.removesuffix("multistep")]
    bare += [form.removeprefix(prefix) for prefix in ("sample", "k") for form in bare]
    found = next((known[form] for form in bare if form in known), None)
    if found is None:
        return ""
    return f" Here it is solver={found}{f', grid={grid!r}' if grid else ''}."
