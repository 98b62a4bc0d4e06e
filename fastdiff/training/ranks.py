"""The processes of a run: started by torchrun or alone. Everything a single process would skip is skipped here.

May import: nothing of the package. On GPUs NCCL moves tensors and gloo moves what is on the host.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

PATIENCE = 1800.0  # seconds that processes may start apart


@dataclass(frozen=True)
class Ranks:
    """rank: of this process among `world`. group: gloo, for flags; None when alone.

    storage: gloo, for checkpoints alone, as a thread writes them while the loop uses `group`.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    storage: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process; all get the same answer."""
        return self.largest(float(flag)) > 0

    def largest(self, value: float) -> float:
        """The largest of a number over all processes."""
        return self._reduce([value], dist.ReduceOp.MAX)[0]

    def totals(self, *values: float) -> list[float]:
        """The sum of each number over all processes, in one message."""
        return self._reduce(list(values), dist.ReduceOp.SUM)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """A tensor on the CPU of every process, in the order of the processes."""
        if self.group is None:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        dist.all_gather(found, tensor, self.group)
        return found

    def share(self, found: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """What every process found, in the order of the processes; all get the same list."""
        if self.group is None:
            return found
        everyone: list[list[tuple[str, str]]] = [[] for _ in range(self.world)]
        dist.all_gather_object(everyone, found, self.group)
        return [each for one in everyone for each in one]

    def wait(self) -> None:
        """Until every process is here."""
        if self.group is not None:
            dist.barrier(self.group)

    def close(self) -> None:
        """Leave the group, as the last thing."""
        if self.group is not None:
            dist.destroy_process_group()

    def _reduce(self, values: list[float], how: dist.ReduceOp.RedOpType) -> list[float]:
        if self.group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, how, self.group)
        return tensor.tolist()


def join(device: str = "auto", threads: int | None = None) -> Ranks:
    """This process's place in the run, as torchrun's environment says; alone without it.

    device: "auto", "cpu" or "cuda". threads: of torch; None shares the cores out.
    Raises: ValueError for a device that is not here.
    """
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {device!r}; torchrun gives each process its own GPU")
    if device == "cuda" and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no GPU: torch sees {torch.cuda.device_count()}; start fewer "
            "processes or use device=cpu"
        )
    place = torch.device("cuda", local) if device == "cuda" else torch.device("cpu")
    if place.type == "cuda":
        torch.cuda.set_device(place)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if "WORLD_SIZE" not in os.environ:
        return Ranks(0, 1, place)
    store, rank, world = next(dist.rendezvous("env://"))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
        store=fresh(store, rank, world), rank=rank, world_size=world,
    )  # fmt: skip
    group, storage = (dist.new_group(backend="gloo") for _ in range(2))
    return Ranks(rank, world, place, group, storage)


def fresh(store: dist.Store, rank: int, world: int) -> dist.Store:
    """A part of the store that only the processes of this start use; each of them gets the same.

    torchrun keeps one store over its restarts, with the addresses of processes that are dead. Here a process asks under
    a name of its own, never used before, so that no answer is of an earlier start.
    Raises: TimeoutError in the first process when others do not come.
    """
    name = uuid4().hex
    if rank:
        store.set(f"fastdiff/{rank}", name)
        part = store.get(name).decode()
        store.set(f"{part}/here/{rank}", "")
        return dist.PrefixStore(part, store)
    deadline = time.monotonic() + PATIENCE
    while missing := [other for other in range(1, world) if not store.check([f"{name}/here/{other}"])]:
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"processes {missing} of {world} did not join within {PATIENCE:g} s; see whether they run and what "
                "they wrote, and start all again"
            )
        for asked in (f"fastdiff/{other}" for other in missing):
            if store.check([asked]):
                store.set(store.get(asked).decode(), name)  # nobody reads it if who asked is of an earlier start
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def spread(net: nn.Module, ranks: Ranks, how: str, precision: str, blocks: list[nn.Module]) -> nn.Module:
    """The network as all processes train it: DDP, FSDP2 (sharded in place), or itself when alone.

    how: "auto" and "ddp" copy the weights to every process, "fsdp" shards them, block by block.
    precision: "bf16" with fsdp also gathers weights in bf16; they are kept in fp32.
    """
    if ranks.group is None:
        return net
    if how == "fsdp":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if precision == "bf16" else None)
        mesh = dist.init_device_mesh(ranks.device.type, (ranks.world,))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        fully_shard(net, mesh=mesh, mp_policy=policy)
        return net
    devices = [ranks.device.index] if ranks.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(net, device_ids=devices, gradient_as_bucket_view=True)


def synchronise(net: nn.Module, last: bool) -> None:
    """Whether the next backward adds up gradients over processes: only that of a step's last micro-batch must."""
    if isinstance(net, nn.parallel.DistributedDataParallel):
        net.require_backward_grad_sync = last
    elif isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(last)


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (every process must ask); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
