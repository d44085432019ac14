"""The optimizer's states in host memory, and a step on them that takes little more than AdamW's own pass.

DeepSpeed 0.19.8 clips all gradients in a pass of its own, casts the new masters on the host, and copies them from
memory that is not pinned: 6.4 of the 8.4 s that a step on the host was planned to take. It keeps each gradient twice,
in pinned memory rounded up to powers of two, and allocates the moments in the first step. Here

- AdamW works through the masters in pieces. Each piece's gradient is clipped just before, only where the norm asks for
  it. Its new masters leave for the device at once, in fp32, and are rounded there, beside the next piece's AdamW.
- The gradient that AdamW reads is the one that micro-steps accumulate, in pinned memory of its own size.
- Everything is allocated before the first step.

A parameter then takes 16 bytes of host memory: its master, two moments and its gradient, all fp32.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import Tensor

from src.models.pinned import pinned_copy

PIECE = 2**22  # elements: 16 MiB of each of the master, its gradient and its moments


class HostAdamW(DeepSpeedCPUAdam):
    """DeepSpeedCPUAdam in pieces.

    gradient_scale: what each gradient is multiplied with first; back to one after the step.
    updated: called with a parameter and the bounds of the elements that are new.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, adamw_mode=True, **kwargs)
        self.gradient_scale = 1.0
        self.updated: Callable[[Tensor, int, int], None] = lambda parameter, start, stop: None

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The parameter's state, made where there is none."""
        state: dict[str, Any] = self.state[parameter]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter)
        self.gradient_scale = 1.0
        return loss

    def _update(self, group: dict[str, Any], parameter: Tensor) -> None:
        state = self.state_of(parameter)
        state["step"] += 1
        assert parameter.grad is not None
        tensors = [t.data.view(-1) for t in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]

        def update(parts: list[Tensor]) -> None:
            names = ("eps", "weight_decay", "bias_correction")
            settings = (group["lr"], *group["betas"], *(group[name] for name in names))
            self.ds_opt_adam.adam_update(self.opt_id, state["step"], *settings, *parts)

        # DeepSpeed takes the powers of the betas by multiplying where it sees a step for the first time, and by `pow`
        # afterwards. A first call on nothing makes them the same for every piece, and after a resume.
        update([torch.zeros(1) for _ in tensors])
        for start in range(0, parameter.numel(), PIECE):
            stop = min(start + PIECE, parameter.numel())
            parts = [t[start:stop] for t in tensors]
            if self.gradient_scale != 1.0:
                parts[1].mul_(self.gradient_scale)
            update(parts)
            self.updated(parameter, start, stop)


Rounded = Callable[[Tensor, int, Tensor, Tensor], None]


def _nearest(flat: Tensor, start: int, masters: Tensor, weights: Tensor) -> None:
    weights.copy_(masters)


class _Steps:
    """What a ZeRO-3 optimizer does around HostAdamW's step; replaces functions of its own, by their names."""

    def __init__(self, zero: Any, adam: HostAdamW, rounded: Rounded) -> None:
        self._zero, self._adam, self._rounded = zero, adam, rounded
        masters = zero.fp32_partitioned_groups_flat
        self._index = {id(master): i for i, master in enumerate(masters)}
        self._sent = set[int]()
        device = get_accelerator().current_device_name()
        self._stream = torch.cuda.Stream(device) if get_accelerator().device_name() == "cuda" else None
        gradients = zero.grad_partitions_flat_buffer.split([m.numel() for m in masters])
        for master, gradient in zip(masters, gradients, strict=True):
            if zero.offload_optimizer_pin_memory:
                master.data = pinned_copy(master.data)
            master.grad = gradient
            adam.state_of(master)
        adam.updated = self._send
        zero.unscale_and_clip_grads = self._clip
        zero._reassign_or_swap_out_partitioned_parameters = self._hand_over

    def _clip(self, sub_group: int, norm: Tensor) -> None:
        zero = self._zero
        clip = max(1.0, (float(norm) / zero.loss_scale + 1e-6) / zero.clip_grad) if zero.clip_grad > 0 else 1.0
        self._adam.gradient_scale = 1.0 / (clip * zero.loss_scale)

    def _send(self, master: Tensor, start: int, stop: int) -> None:
        """New masters, fp32, to the weights that they belong to."""
        index = self._index[id(master)]
        weights, part = self._zero.fp16_partitioned_groups_flat[index], master.data[start:stop]
        if self._stream is None or not weights.is_cuda:
            self._rounded(master, start, part, weights.data[start:stop])
        else:
            if not self._sent:
                self._stream.wait_stream(torch.cuda.current_stream(weights.device))
            with torch.cuda.stream(self._stream):
                self._rounded(master, start, part.to(weights.device, non_blocking=True), weights.data[start:stop])
        self._sent.add(index)

    def _hand_over(self, sub_group: int) -> None:
        """The weights are the masters'; also after a load, which takes no step."""
        master = self._zero.fp32_partitioned_groups_flat[sub_group]
        if sub_group not in self._sent:
            for start in range(0, master.numel(), PIECE):
                self._send(master, start, min(start + PIECE, master.numel()))
        self._sent.discard(sub_group)
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        self._zero._unflatten_partitioned_parameters(sub_group)


def _is_ours(zero: DeepSpeedZeroOptimizer_Stage3) -> bool:
    """Whether all its states are in host memory, and none on a disk."""
    on_disk = zero.swap_optimizer or zero.params_in_nvme_and_cpu
    in_fp32 = zero.gradient_accumulation_dtype == zero.master_weights_and_grads_dtype == torch.float32
    whole = zero.offload_optimizer and zero.partial_offload == 1.0
    return whole and in_fp32 and not on_disk and isinstance(zero.optimizer, HostAdamW)


def step_in_pieces(zero: Any, rounded: Rounded = _nearest) -> None:
    """Has a ZeRO-3 optimizer whose states are in host memory step as this file does; others stay as they are.

    rounded: writes the weights of masters; called with the flat tensor of masters, the index there of the first of
        them, the masters [n] on the weights' device, and the weights [n].
    """
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3) and _is_ours(zero):
        _Steps(zero, zero.optimizer, rounded)


@contextmanager
def allocated_once() -> Iterator[None]:
    """While DeepSpeed builds an engine: no second gradient on the host, and pinned memory of the size asked for."""
    stage3, accelerator = DeepSpeedZeroOptimizer_Stage3, get_accelerator()
    allocate = stage3.initialize_optimizer_states

    def initialize(self: Any) -> None:
        if not _is_ours(self):
            allocate(self)

    stage3.initialize_optimizer_states = initialize
    if accelerator.device_name() == "cuda":
        accelerator.pin_memory = lambda tensor, *_, **__: pinned_copy(tensor)
    try:
        yield
    finally:
        stage3.initialize_optimizer_states = allocate
        vars(accelerator).pop("pin_memory", None)
