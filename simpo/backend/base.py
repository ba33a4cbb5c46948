"""Runs one process: its device, precision, collective operations, update and checkpoints.

All processes of a run take the same steps at the same time. The loss is a sum over this process's
pairs divided by the number of pairs of all processes, so gradients must be summed over processes.
The frameworks average them; `backward` multiplies by the number of processes to undo that.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict
from torch.optim import Optimizer

from simpo.config.backends import BackendConfig, DdpConfig, DistributedConfig
from simpo.config.choices import Device, Precision
from simpo.config.errors import ConfigError, LostError
from simpo.model.policy import Policy
from simpo.run.processes import LISTEN_VARIABLE, a_rank_has_failed

JOIN_S = 1800
"""How long a process waits for the others to start; imports from slow disks take long."""
LONGEST_WAIT_S = 24 * 3600
"""How long one process may tokenise, evaluate or write its part of a checkpoint while the others
wait. The process that started the ranks notices sooner if one hangs or dies."""
NOTICE_AFTER_S = 30.0
PAUSE_S = 0.2

T = TypeVar("T")


class Backend:
    """One process that holds the whole policy (backend=single, ddp).

    Attributes:
        device: device of rows and weights.
        bf16: whether the forward computes in bf16; otherwise in fp32.
        rank, processes: this process's rank and the number of processes. Only rank 0 writes files,
            except for the other ranks' parts of a checkpoint.
        checkpoint_format: checkpoints of another format cannot be read.
        reads_shards: whether `prepare` takes a policy with `unread` weights.
    """

    checkpoint_format = "dcp"
    reads_shards = False

    def __init__(
        self, config: BackendConfig, precision: Precision, max_grad_norm: float = 0.0
    ) -> None:
        """Join the other processes, which are found by the environment variables of torchrun.

        Args:
            precision: of the forward; auto is bf16 if the device is fast in bf16, else fp32.
            max_grad_norm: gradients are clipped to this norm; 0 does not clip.

        Raises:
            ConfigError: the device is not there, or the number of running processes is not the
                number asked for.
        """
        cuda = torch.cuda.is_available()
        if config.device is Device.cuda and not cuda:
            raise ConfigError(["backend.device: cuda asked for, but torch sees no GPU here"])
        self.on_gpu = cuda and config.device is not Device.cpu
        if precision is Precision.auto:
            fast_bf16 = self.on_gpu or _cpu_multiplies_bf16()
            precision = Precision.bf16 if fast_bf16 else Precision.fp32
        self.bf16 = precision is Precision.bf16
        self._name = config.name
        self._max_grad_norm = max_grad_norm
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if not isinstance(config, DistributedConfig) and started != 1:
            raise ConfigError([f"backend: single runs in 1 process, got {started} (backend=ddp)"])
        # accelerate's state is global, and the next run of a sweep may use another precision.
        AcceleratorState._reset_state(reset_partial_state=True)
        self._store: dist.Store | None = None
        if isinstance(config, DistributedConfig) and "RANK" in os.environ:
            self._store = self._join(config)
        self._calls = 0
        self._notice_after_s = min(NOTICE_AFTER_S, getattr(config, "timeout_s", NOTICE_AFTER_S))
        self._accelerator = self._start(config)
        self.rank, self.processes = self._accelerator.process_index, self._accelerator.num_processes
        # accelerate silently runs as one process if it does not recognise the launcher.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", self.processes))
        wanted = getattr(config, "processes", None) or here
        if self.processes != started or here != wanted:
            raise ConfigError(
                [
                    f"backend.processes: {wanted} asked for here and {started} started in all, but "
                    f"{self.processes} run (under torchrun, accelerate launch and Slurm leave it "
                    "out)"
                ]
            )
        self.processes_here = here
        self.device: torch.device = self._accelerator.device
        self._group: dist.ProcessGroup | None = None

    def _join(self, config: DistributedConfig) -> dist.Store:
        """Connect to the store of rank 0 or torchrun, and initialise the process group."""
        patience = timedelta(seconds=JOIN_S)
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if listener := os.environ.get(LISTEN_VARIABLE):
            # A listener created by torch would be bound to all network interfaces.
            host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store: dist.Store = dist.TCPStore(
                host, port, count, is_master=True, timeout=patience, master_listen_fd=int(listener)
            )
        else:
            store, _, _ = next(dist.rendezvous("env://", timeout=patience))
        timeout = timedelta(seconds=config.timeout_s)
        store.set_timeout(timeout)
        dist.init_process_group(
            self._communication(), store=store, rank=rank, world_size=count, timeout=timeout
        )
        return store

    def _communication(self) -> str:
        return "cuda:nccl,cpu:gloo" if self.on_gpu else "gloo"

    def _start(self, config: BackendConfig) -> Accelerator:
        handlers: list[Any] = []
        if isinstance(config, DdpConfig):
            handlers = [
                InitProcessGroupKwargs(backend=self._communication()),
                DistributedDataParallelKwargs(
                    bucket_cap_mb=config.bucket_cap_mb,
                    gradient_as_bucket_view=True,
                ),
            ]
        return Accelerator(
            cpu=not self.on_gpu, mixed_precision=self._precision(), kwargs_handlers=handlers
        )

    def _precision(self) -> str:
        return "bf16" if self.bf16 else "no"

    def __str__(self) -> str:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        many = "" if self._name == "single" else f" ({self._name}, {self.processes} processes)"
        return f"{'bf16' if self.bf16 else 'fp32'} on {self.processes} {name}{many}"

    # Collective operations.

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all processes, on the CPU."""
        if self.processes > 1:
            # Sums of host memory do not wait for the GPU, where the group has gloo.
            if values.device.type != "cpu" or "gloo" not in self._communication():
                values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.sum(torch.tensor(int(flag))))

    def gather(self, values: list[T]) -> list[T]:
        """The lists of all processes, concatenated by rank; waits for the slowest process."""
        if self.processes == 1:
            return values
        self.wait()
        parts: list[list[T]] = [[] for _ in range(self.processes)]
        dist.all_gather_object(parts, values)
        return [value for part in parts for value in part]

    def broadcast(self, value: T) -> T:
        """Rank 0's value, in all processes; waits for rank 0."""
        if self.processes == 1:
            return value
        self.wait()
        box = [value]
        dist.broadcast_object_list(box, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Wait until all processes have called this, for at most `LONGEST_WAIT_S`.

        The collective operations of a step use the shorter `backend.timeout_s`.

        Raises:
            LostError: a process has failed or did not arrive in time.
        """
        self._wait_for_arrivals(self.processes)

    @contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """Run the block on rank 0 first, then on the others, which find rank 0's results cached.

        Args:
            what: what rank 0 does, as a past participle ("read the data"), for the notice that it
                prints when it takes long.
        """
        line = f"wait   the other processes continue once rank 0 has {what}"
        notice = threading.Timer(self._notice_after_s, print, [line], {"file": sys.stderr})
        notice.daemon = True
        if not self.is_main:
            self._wait_for_arrivals(1, arrives=False)
        elif self.processes > 1:
            notice.start()
        try:
            yield
        finally:
            notice.cancel()
        if self.is_main:
            self._wait_for_arrivals(0)

    def close(self) -> None:
        """Destroy the process group once all processes call this; rank 0, which may host the store,
        leaves last."""
        self.wait()
        self._wait_for_arrivals(self.processes - 1 if self.is_main else 0, arrives=not self.is_main)
        self._accelerator.end_training()

    def _wait_for_arrivals(self, count: int, arrives: bool = True) -> None:
        """Wait until `count` processes have arrived at this call of the function.

        This polls the store, since a collective operation would time out.

        Args:
            arrives: whether this process counts as one that has arrived.

        Raises:
            LostError: a process has failed, or `LONGEST_WAIT_S` have passed.
        """
        if self._store is None:
            return
        self._calls += 1
        key, pause_s = f"simpo/{self._calls}", 0.001
        came = self._store.add(key, int(arrives))
        deadline = time.monotonic() + LONGEST_WAIT_S
        while came < count:
            if time.monotonic() > deadline:
                raise LostError(
                    f"rank {self.rank}: waited {LONGEST_WAIT_S} s for the other processes"
                )
            if a_rank_has_failed():
                raise LostError(f"rank {self.rank}: waited for a process that has failed")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_S)
            came = self._store.add(key, 0)

    # The policy.

    def prepare(self, policy: Policy, optimizer: Optimizer) -> tuple[nn.Module, Optimizer]:
        """Wrap the policy and the optimizer for this backend.

        Returns:
            The module to call in place of the policy, and the optimizer. The policy itself is still
            used for names, settings and generation.
        """
        self.wait()  # a process may have loaded the policy from a slower disk
        wrapped, optimizer = self._accelerator.prepare(policy, optimizer)
        return wrapped, optimizer

    def micro_batch(self, wrapped: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Context for a forward and its `backward`; `last` if a `step` follows directly."""
        no_sync = getattr(wrapped, "no_sync", None)
        return nullcontext() if last or no_sync is None else no_sync()

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of this process's part of the loss."""
        self._accelerator.backward(loss * self.processes)

    def clip(self, wrapped: nn.Module) -> Tensor | None:
        """Clip the gradients, without waiting for the device.

        Returns:
            The norm of all gradients before clipping, []; None if `step` clips.
        """
        norm: Any = self._accelerator.clip_grad_norm_(
            wrapped.parameters(), self._max_grad_norm or float("inf")
        )
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    def step(self, wrapped: nn.Module, optimizer: Optimizer, norm: float) -> float:
        """Update the weights and zero the gradients, which DDP keeps as parts of its buckets.

        Args:
            norm: of `clip`.

        Returns:
            The norm of all gradients before clipping. If it is not finite, no weight is updated.
        """
        if norm < float("inf"):
            optimizer.step()
        optimizer.zero_grad(set_to_none=not hasattr(wrapped, "no_sync"))
        return norm

    def unsharded(self, policy: Policy) -> AbstractContextManager[Any]:
        """Context in which the policy's weights are gathered for generation."""
        return nullcontext()

    def whole(
        self, wrapped: nn.Module, weights: Mapping[str, Tensor]
    ) -> Iterator[tuple[str, Tensor]]:
        """Weights or buffers of the policy by name, gathered one after the other.

        All processes iterate at the same time. On rank 0 the results are in host memory.
        DeepSpeed's are the fp32 weights of its optimizer.
        """
        for name, weight in weights.items():
            yield name, self._whole(weight)

    def _whole(self, weight: Tensor) -> Tensor:
        return weight.detach().cpu() if self.is_main else weight

    # Checkpoints.

    def save_state(
        self, folder: Path, wrapped: nn.Module, optimizer: Optimizer, background: bool = False
    ) -> Future[Any] | None:
        """Write trained weights and optimizer state; each process writes its part.

        Args:
            folder: an empty folder.
            background: copy the state now and write it in a background thread.

        Returns:
            With `background`, a future that is done when everything is written.

        Raises:
            OSError, CheckpointException: the state could not be written.
        """
        state = self._state(wrapped, optimizer)
        if background:
            done = dcp.async_save(state, checkpoint_id=folder, **self._checkpoint_group())
            assert isinstance(done, Future)
            return done
        dcp.save(state, checkpoint_id=folder, **self._checkpoint_group())
        return None

    def load_state(
        self, folder: Path, wrapped: nn.Module, optimizer: Optimizer, processes: int
    ) -> None:
        """Load the weights and optimizer state that `save_state` wrote.

        Args:
            processes: number of processes that wrote them.
        """
        state = self._state(wrapped, optimizer)
        # This fills the weights in place.
        dcp.load(state, checkpoint_id=folder, **self._checkpoint_group())
        state_dict.set_optimizer_state_dict(
            wrapped, _unwrapped(optimizer), optim_state_dict=state["optimizer"]
        )

    def _state(self, wrapped: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        weights = {
            name.removeprefix("module."): p.detach()
            for name, p in wrapped.named_parameters()
            if p.requires_grad
        }
        return {
            "policy": weights,
            "optimizer": state_dict.get_optimizer_state_dict(wrapped, _unwrapped(optimizer)),
        }

    def _checkpoint_group(self) -> dict[str, Any]:
        """Process group of checkpoints, its own so that background saves and steps do not mix."""
        if not dist.is_initialized():
            return {"no_dist": True}
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=LONGEST_WAIT_S))
        return {"process_group": self._group}


def not_written(error: BaseException) -> bool:
    """Whether an error of torch's file writer says that a file could not be written."""
    terms = ("PytorchStreamWriter", "inline_container", "iostream error")
    return any(term in str(error) for term in terms)


def _unwrapped(optimizer: Optimizer) -> Optimizer:
    """torch's optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 instructions; without them bf16 is emulated, slower than fp32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
