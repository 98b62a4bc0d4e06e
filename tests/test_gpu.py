"""The loop on a CUDA device: executors against the CPU, graph against eager, replay without recapture, no host sync."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from train_cases import Case, fresh

import fastdiff as fd
from fastdiff.engine import train_ops
from fastdiff.engine.request import Request
from fastdiff.errors import BatchTooLarge

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
EXECUTORS = [name for name in ("triton", "cuda") if fd.backends()[name].ok]


class Bumpy(nn.Module):
    """Treats each element alone, so that only the sampler can make two devices or batches differ."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.9))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        shift = 0.0 if label is None else 0.1 * label.view(-1, 1, 1, 1).to(x.dtype)
        return self.gain * torch.tanh(x + shift) * (1 + 0.1 * t.cos().view(-1, 1, 1, 1)).to(x.dtype)


def denoiser(device: str, dtype: torch.dtype = torch.float32) -> fd.Denoiser:
    return fd.Denoiser(Bumpy().to(device, dtype).requires_grad_(False), fd.schedules.edm(), "edm", sigma_data=0.5)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "heun", "dpmpp_2m", "dpmpp_2m_sde"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (2, 3, 9, 7)])
def test_executors_agree_with_the_cpu(
    executor: str, solver: str, layout: torch.memory_format, shape: tuple[int, ...]
) -> None:
    draw = {"solver": solver, "steps": 8, "seed": 3, "memory_format": layout}
    expected = fd.sample(denoiser("cpu"), shape, backend="reference", **draw)
    for graph in (False, True):
        got = fd.sample(denoiser("cuda"), shape, backend=executor, graph=graph, **draw).cpu()
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_graph_equals_eager_and_a_seed_is_its_image_in_any_batch(executor: str) -> None:
    model = denoiser("cuda", torch.bfloat16)
    draw = {"solver": "dpmpp_2m_sde", "steps": 10, "backend": executor}
    alone = fd.sample(model, (1, 3, 16, 16), seed=[17], graph=False, **draw)
    batch = fd.sample(model, (64, 3, 16, 16), seed=[*range(100, 163), 17], graph=True, **draw)
    assert torch.equal(alone[0], batch[63])
    assert torch.equal(batch, fd.sample(model, (64, 3, 16, 16), seed=[*range(100, 163), 17], graph=True, **draw))


@pytest.mark.parametrize("executor", EXECUTORS)
def test_one_capture_serves_new_seeds_labels_and_guidance_without_a_sync(executor: str) -> None:
    model = denoiser("cuda")
    plan = fd.plan("dpmpp_2m", model.schedule, 12, "karras")
    sampler, eager = fd.Sampler(plan, model, executor, graph=True), fd.Sampler(plan, model, executor, graph=False)
    shape = (4, 3, 16, 16)
    for seed, label, guidance in ((0, 1.0, 2.0), (9, 3.0, 5.0), (9, 0.0, [1.0, 2.0, 3.0, 4.0])):
        arguments = {
            "seed": seed,
            "cond": {"label": torch.full((4,), label, device="cuda")},
            "uncond": {"label": torch.zeros(4, device="cuda")},
            "guidance": guidance,
        }
        got = sampler.sample(shape, **arguments)
        assert torch.equal(got, eager.sample(shape, **arguments))
    assert sampler.memory().captured == 1 and sampler.memory().graphs > 0

    (graphs,) = [entry.graphs for entry in sampler._shelf.entries if entry.graphs is not None]
    (replay,) = graphs._replays.values()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(12):
            replay()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("graph", [True, "loop"])
def test_captures_are_shared_by_samplers_and_serve_rows_of_several_kinds(executor: str, graph: bool | str) -> None:
    model = denoiser("cuda")
    shape, seen = (3, 3, 16, 16), []
    both = {"cond": {"label": torch.ones(3, device="cuda")}, "uncond": {"label": torch.zeros(3, device="cuda")}}
    for solver, options in (
        ("dpmpp_2m", {}),
        ("res_multistep", {}),
        ("dpmpp_2m", {"guidance_interval": (0.5, 10.0)}),
        ("dpmpp_2m", {"skipping": {"every": 3, "order": 1}}),
    ):
        plan = fd.plan(solver, model.schedule, 9, **options)
        sampler = fd.Sampler(plan, model, executor, graph=graph)
        got = sampler.sample(shape, seed=5, guidance=3.0, **both)
        assert torch.equal(
            got, fd.Sampler(plan, model, executor, graph=False).sample(shape, seed=5, guidance=3.0, **both)
        )
        seen.append(sampler.memory().captured)
        assert sampler.last_run is not None and sampler.last_run.graph == ("loop" if graph == "loop" else "step")
    assert seen[0] == seen[1] == 1 and seen[2] > 1


@pytest.mark.parametrize("executor", EXECUTORS)
def test_compiled_networks_are_captured_too(executor: str) -> None:
    plain = denoiser("cuda")
    compiled = plain.around(torch.compile(plain.net))  # type: ignore[arg-type]
    for model in (plain, compiled):
        draws = [fd.sample(model, (4, 3, 16, 16), steps=6, backend=executor, graph=graph) for graph in (True, False)]
        assert torch.equal(*draws)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("graph", [True, False])
def test_a_stream_gives_what_each_request_gives_alone_and_never_waits_for_the_device(
    executor: str, graph: bool
) -> None:
    model = denoiser("cuda")
    stream = fd.stream(model, (3, 16, 16), slots=5, backend=executor, graph=graph)
    both = {"cond": {"label": torch.ones(1, device="cuda")}, "uncond": {"label": torch.zeros(1, device="cuda")}}
    wanted = [("dpmpp_2m", 7, 1.0), ("heun", 3, 2.0), ("ddpm", 9, 1.0), ("dpmpp_2m_sde", 6, 4.0), ("ddim", 2, 1.0)] * 3

    def submit() -> list[Request]:
        return [stream.submit(s, steps=n, seed=i, guidance=w, **both) for i, (s, n, w) in enumerate(wanted)]

    for _ in range(2):  # the first time its buffers grow, the second all sizes are captured on the last ones
        list(submit() and stream)
    requests = submit()
    torch.cuda.set_sync_debug_mode("error")
    try:
        done = list(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(done) == len(wanted)
    for i, ((solver, steps, w), request) in enumerate(zip(wanted, requests, strict=True)):
        solo = fd.sample(
            model, (1, 3, 16, 16), solver, steps, seed=i, guidance=w, backend=executor, graph=False, **both
        )
        assert torch.equal(request.result(), solo[0])
    assert stream.stats().bytes > 0 and stream.stats().throughput > 0


def test_reused_features_in_a_graph() -> None:
    config = fd.models.UNetConfig(
        sample_size=16,
        block_out_channels=(32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=8,
    )
    net = fd.models.UNet(config).cuda().eval().requires_grad_(False)
    model = fd.models.reuse_features(fd.Denoiser(net, "linear"), every=3)
    eager = fd.sample(model, (2, 3, 16, 16), "ddim", 8, graph=False)
    for graph in (True, "loop"):
        assert (fd.sample(model, (2, 3, 16, 16), "ddim", 8, graph=graph) - eager).abs().max() < 1e-4 * eager.abs().max()


def test_more_than_the_device_has() -> None:
    model = denoiser("cuda")
    with pytest.raises(BatchTooLarge, match="largest batch that fits") as caught:
        fd.sample(model, (1 << 20, 3, 512, 512), steps=2)
    total = torch.cuda.get_device_properties(0).total_memory
    image = 4 * 3 * 512 * 512
    assert 0 < caught.value.largest < total / (3 * image)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_non_finite_output_is_found_after_the_graph(executor: str) -> None:
    broken = fd.Denoiser(
        lambda x, t: torch.where(t.view(-1, 1, 1, 1) < 0, torch.full_like(x, float("nan")), x),
        fd.schedules.edm(), "edm", sigma_data=0.5, device="cuda",
    )  # fmt: skip
    plan = fd.plan("ddim", broken.schedule, 10, "karras")
    first = next(i for i, level in enumerate(plan.levels) if level.sigma < 1.0)
    with pytest.raises(FloatingPointError, match=f"row {first} of 10"):
        fd.Sampler(plan, broken, executor, graph=True).sample((2, 3, 8, 8))


def test_a_network_that_cannot_be_captured_runs_eagerly_with_one_warning() -> None:
    def syncs(x: Tensor, t: Tensor) -> Tensor:
        return x * float(t[0].cos().item())

    model = fd.Denoiser(syncs, fd.schedules.edm(), "edm", sigma_data=0.5, device="cuda")
    eager = fd.sample(model, (2, 3, 8, 8), steps=3, graph=False)
    with pytest.warns(UserWarning, match=r"cannot be captured.*item\(\)"):
        assert torch.equal(eager, fd.sample(model, (2, 3, 8, 8), steps=3))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("solver", "options"), [("dpm_adaptive", {"eta": 0.5}), ("rk45", {"rtol": 1e-3})])
def test_adaptive_steps_in_a_graph_and_in_any_batch(executor: str, solver: str, options: dict[str, float]) -> None:
    model = denoiser("cuda")
    draw = {"solver": solver, "backend": executor, "noise": "brownian", **options}
    batch = fd.sample(model, (16, 3, 16, 16), seed=[*range(100, 115), 17], graph=True, **draw)
    eager = fd.sample(model, (16, 3, 16, 16), seed=[*range(100, 115), 17], graph=False, **draw)
    alone = fd.sample(model, (1, 3, 16, 16), seed=[17], graph=True, **draw)
    assert torch.equal(batch, eager) and torch.equal(batch[15], alone[0])
    expected = fd.sample(denoiser("cpu"), (1, 3, 16, 16), seed=[17], **{**draw, "backend": "reference"})
    assert (alone.cpu() - expected).abs().max() <= 1e-3 * expected.abs().max()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 9, 7), (320, 4, 4), (1, 260, 300)])
def test_the_training_ops_agree_with_the_cpu_and_are_captured(executor: str, shape: tuple[int, ...]) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        for dtypes in ((torch.uint8, torch.bfloat16), (torch.float32, torch.float32)):
            case = Case(shape, 4, layout, *dtypes).tensors()
            here, there = fresh(case), fresh(case, "cuda")
            step = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[dtypes[1]]
            for op in ("noising", "loss"):
                for t, on in ((here, "reference"), (there, executor)):
                    if op == "noising":
                        train_ops.noise_images(*t.arguments()[:4], executor=on)  # type: ignore[arg-type]
                    else:
                        train_ops.loss(t, 0.5, on)
                assert here.out is not None and there.out is not None
                torch.testing.assert_close(there.out.cpu(), here.out, rtol=step, atol=step)
            assert here.partial is not None and there.partial is not None
            torch.testing.assert_close(there.partial.sum(1).cpu(), here.partial.sum(1), rtol=1e-5, atol=0)
            eager = fresh(there, "cuda")
            graph = torch.cuda.CUDAGraph()
            train_ops.loss(eager, 0.5, executor)
            with torch.cuda.graph(graph):
                train_ops.loss(eager, 0.5, executor)
            assert eager.out is not None and eager.partial is not None
            eager.out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(eager.out, there.out) and torch.equal(eager.partial, there.partial)
