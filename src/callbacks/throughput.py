"""How fast the job trains and where its time goes: tokens/s, MFU, time by phase, memory."""

from typing import Any, Protocol, cast

import lightning.pytorch as pl
import psutil  # type: ignore[import-untyped]
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from src.callbacks.phase_timer import PHASES, TRAINING, Phases
from src.planner.cards import card_of
from src.units import GIB

LITTLE = 0.02  # of a node's memory; what `plan` keeps for the system


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations per second of the device; None if unknown, as for a CPU."""
    if device.type != "cuda":
        return None
    card = card_of(torch.cuda.get_device_name(device))
    return None if card is None else 1e12 * card.peak


class CountedModel(Protocol):
    """src.models.deepseek_v3.DeepseekV3ForCausalLM is one."""

    def step_flops(self, tokens: int, squares: int, targets: int, mtp_targets: int) -> int: ...


class Throughput(pl.Callback):
    """Logs speed, phases and memory after each optimizer step, over all ranks:

    - `train/tokens_per_second`: unpadded tokens over the step's time. `train/step_seconds`: that time on rank 0,
      without validation, checkpoints and samples.
    - `train/mfu`: useful operations (forward and backward at the documents' true lengths; no padding, no recomputation)
      over the devices' bf16 peak in that time. Absent if the device's peak is unknown.
    - `time/PHASE`: seconds in data (waiting for a batch), forward, backward, optimizer and other, mean over ranks;
      `time/data_slowest_rank`: the longest wait of one rank, during which the others wait in their forward.
      Checkpoint, validation and samples are those since the previous step.
    - `memory/peak_gib`, `memory/reserved_gib`: peak memory of tensors, and of PyTorch with its cache, in the step, on
      the fullest GPU. `memory/host_available_gib`: of the fullest node; one warning below LITTLE of its memory, since
      Linux kills processes without a message when none is left.
    """

    def __init__(self) -> None:
        self._warned = False
        self._step = 0
        self._squares: Tensor | None = None  # sum of this step's squared document lengths, of this rank's rows
        self._peak: float | None = None

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._phases = Phases.of(trainer)
        self._peak = peak_flops(trainer.strategy.root_device)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._squares = trainer.global_step, None
        self._phases.take()

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # Padding is a last document without a source. Computed on the device, without a sync.
        lengths = batch["cu_seqlens"].diff()[: len(batch["sources"])].double()
        squares = (lengths * lengths).sum()
        if self._squares is None:  # the step's first micro-batch
            self._squares = torch.zeros_like(squares)
            if squares.is_cuda:
                torch.cuda.reset_peak_memory_stats(squares.device)
        self._squares += squares

    @override
    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._phases.start("validation")

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._phases.stop("validation")

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return  # in the middle of accumulation
        self._step = trainer.global_step
        assert self._squares is not None
        own = self._phases.take()
        seconds = sum(own[phase] for phase in TRAINING)
        host = psutil.virtual_memory()
        values = [
            *(own[phase] for phase in PHASES),
            *_memory_peaks(trainer.strategy.root_device),
            host.available / GIB,
            host.available / host.total,
        ]
        ours = torch.cat([self._squares.view(1), self._squares.new_tensor(values)])
        self._squares = None
        every = trainer.strategy.all_gather(ours).view(-1, len(ours)).cpu()  # [ranks, values], the step's one exchange
        mean, most = every.mean(0).tolist(), every.max(0).values.tolist()

        pl_module.log("train/tokens_per_second", batch["step_tokens"] / seconds)
        pl_module.log("train/step_seconds", seconds)
        if self._peak is not None:
            sp_size = getattr(trainer.strategy, "sequence_parallel_size", 1)  # ranks that have the same rows
            squares = round(every[:, 0].sum().item() / sp_size)
            model = cast(CountedModel, pl_module.model)
            flops = model.step_flops(batch["step_tokens"], squares, batch["step_targets"], batch["step_mtp_targets"])
            pl_module.log("train/mfu", flops / (seconds * self._peak * trainer.world_size))
        for index, phase in enumerate(PHASES, start=1):
            pl_module.log(f"time/{phase}", mean[index])
        pl_module.log("time/data_slowest_rank", most[1 + PHASES.index("data")])
        fullest = int(every[:, -1].argmin())  # a rank of the fullest node
        left, part = every[fullest, -2:].tolist()
        pl_module.log("memory/host_available_gib", left)
        if part < LITTLE and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"the node of rank {fullest} has {left:.0f} GiB of host memory left, {part:.1%}. When none is left "
                "Linux kills a process of it without a word, and the job ends. "
                "From the last checkpoint on, needing less: --checkpoint.async_save false (a copy of the states), "
                "--model.attention_output recompute, --data.num_workers 1, or more nodes."
            )
        if trainer.strategy.root_device.type == "cuda":
            pl_module.log("memory/peak_gib", most[-4] / GIB)
            pl_module.log("memory/reserved_gib", most[-3] / GIB)


def _memory_peaks(device: torch.device) -> tuple[float, float]:
    """Peak bytes allocated and reserved since the step began."""
    if device.type != "cuda":
        return 0.0, 0.0
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
