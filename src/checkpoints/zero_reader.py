"""Ranges of a Lightning-DeepSpeed checkpoint's fp32 masters, moments and buffers, by our parameter names.

DeepSpeed (0.19.8; deepspeed/utils/zero_to_fp32.py reads the same files whole) writes a directory

    latest                                                      the name of the folder with the state, "checkpoint"
    checkpoint/[bf16_]zero_pp_rank_{r}_mp_rank_00_optim_states.pt   rank r's flat masters and moments
    checkpoint/zero_pp_rank_{r}_mp_rank_00_model_states.pt      stage 3: names, shapes, buffers, frozen partitions
    checkpoint/mp_rank_00_model_states.pt                       stages 0 to 2: the same, parameters and all

in which the optimizer's groups are flat tensors:

    stage 3     rank r's group is the concatenation of its partitions, [r*p, (r+1)*p) of each parameter; where ranks
                share the experts, n of them, rank r has those of every n-th rank, its part by its place among these
    stages 1, 2 the concatenation of a group's parameters is cut into one part for each rank

The files are memory-mapped: a range costs the pages that it touches, in the page cache, not in this process.
"""

import copy
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, Literal

import torch
from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    BUFFER_NAMES,
    FP32_FLAT_GROUPS,
    FROZEN_PARAM_FRAGMENTS,
    FROZEN_PARAM_SHAPES,
    GROUP_PADDINGS,
    OPTIMIZER_STATE_DICT,
    PARAM_ALIGNMENT_PADDINGS,
    PARAM_SHAPES,
    PARTITION_COUNT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_STAGE,
)

from src.checkpoints.safe_load import load_safely
from src.errors import UserError
from src.units import counted
from src.weights.source import raise_listed

Slot = Literal["fp32", "exp_avg", "exp_avg_sq"]

# In a checkpoint of stage 0, put there by our strategy: the trained parameters' names, in the optimizer's order.
OPTIMIZER_NAMES = "optimizer_names"
# Put there too: how many ranks share a layer's experts; 1 if absent.
EXPERT_PARALLEL_SIZE = "expert_parallel_size"

_OPTIM = re.compile(r"((?:bf16_|fp16_)?zero_pp_rank_)(\d+)(_mp_rank_00_optim_states\.pt)")


@dataclass(frozen=True)
class _Place:
    """The place of a parameter's elements: element i is at `base + inner` of rank `ranks[r]`'s flat tensor, where
    r, inner = divmod(shift + i, period)."""

    shape: tuple[int, ...]
    ranks: range
    flat: int | str  # the optimizer's group, or the name of a frozen fragment
    shift: int
    period: int
    base: int


class ZeroCheckpointSource:
    """A checkpoint of ZeRO stage 0 to 3, in our parameter names; wrap it in `PerExpert` for Hugging Face's.

    Args:
        path: the checkpoint's directory, the one that holds `latest`.
        slot: `fp32` for the weights with frozen parameters and buffers; `exp_avg`, `exp_avg_sq` for AdamW's moments
            of the trained parameters. Weights are the fp32 masters; of stage 0 and of frozen parameters the checkpoint
            names only the model's own precision, which is then what is read.
        prefix: what the LightningModule puts before our names; tensors without it are not offered.

    Raises:
        ValueError: not a checkpoint; one list of all files that are missing or torn; no such slot.
    """

    def __init__(self, path: str | Path, slot: Slot = "fp32", prefix: str = "model.") -> None:
        self.path = Path(path)
        self._prefix = prefix
        self._lock = RLock()
        self._files: dict[Path, dict[str, Any]] = {}
        latest = self.path / "latest"
        if not latest.is_file():
            raise UserError(
                f"{self.path} is not a checkpoint: it has no file `latest`; give a directory such as step=100.ckpt"
            )
        self._folder = self.path / latest.read_text().strip()
        self._optim_files = self._list_optim_files()
        self.world_size, self.stage = len(self._optim_files), self._stage()
        self._model_files = self._list_model_files()
        self._check_files([*self._optim_files, *self._model_files])
        self.expert_parallel_size: int = self._load(self._model_files[0]).get(EXPERT_PARALLEL_SIZE, 1)
        self._select(slot)

    def at(self, slot: Slot) -> "ZeroCheckpointSource":
        """The same checkpoint's other slot; its files are opened and checked once."""
        other = copy.copy(self)
        other._select(slot)
        return other

    def _select(self, slot: Slot) -> None:
        self._slot = slot
        self._whole: dict[str, torch.Tensor] = {}  # buffers, and whatever stages 0 to 2 keep unpartitioned
        self._places = self._find_places()
        if slot == "fp32":
            self._find_frozen_and_buffers()
        elif self.stage == 0:
            self._find_whole_moments()

    @property
    def step(self) -> int:
        """AdamW's step count, for its bias correction."""
        return int(self._adam(0)[0]["step"])

    def names(self) -> Iterable[str]:
        return [*self._places, *self._whole]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._places[name].shape if name in self._places else tuple(self._whole[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        if name in self._whole:
            return self._whole[name].dtype
        place = self._places[name]
        return self._flat(place.ranks[0], place.flat).dtype

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self._whole:
            return self._whole[name].view(-1)[start:stop]
        place, parts = self._places[name], []
        assert 0 <= start <= stop <= math.prod(place.shape), f"{name}: range [{start}, {stop}) of {place.shape}"
        while start < stop:
            rank, inner = divmod(place.shift + start, place.period)
            count = min(stop - start, place.period - inner)
            parts.append(self._flat(place.ranks[rank], place.flat)[place.base + inner : place.base + inner + count])
            start += count
        if not parts:
            return torch.empty(0, dtype=self.dtype(name))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _list_optim_files(self) -> list[Path]:
        """Every rank's optimizer file, existing or not; none for stage 0."""
        matches = [match for file in self._folder.glob("*") if (match := _OPTIM.fullmatch(file.name))]
        sound = [match for match in matches if zipfile.is_zipfile(self._folder / match[0])]
        if not matches:
            return []
        if not sound:
            raise_listed(f"{self._folder}: torn files; use another checkpoint:", sorted(match[0] for match in matches))
        count = self._optim(self._folder / sound[0][0])[PARTITION_COUNT]
        world_size = max(count) if isinstance(count, list) else int(count)
        return [self._folder / f"{matches[0][1]}{rank}{matches[0][3]}" for rank in range(world_size)]

    def _stage(self) -> int:
        sound = [file for file in self._optim_files if file.is_file() and zipfile.is_zipfile(file)]
        # DeepSpeed's BF16_Optimizer, which it takes for stage 1 with fp32 gradients, does not name its stage.
        return int(self._optim(sound[0]).get(ZERO_STAGE, 1)) if sound else 0

    def _list_model_files(self) -> list[Path]:
        if self.stage < 3:
            return [self._folder / "mp_rank_00_model_states.pt"]
        return [self._folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(self.world_size)]

    def _check_files(self, files: list[Path]) -> None:
        def wrong(file: Path) -> str | None:
            if not file.is_file():
                return f"{file.name}: missing"
            return None if zipfile.is_zipfile(file) else f"{file.name}: torn, {file.stat().st_size} bytes"

        with ThreadPoolExecutor(16) as pool:
            problems = [problem for problem in pool.map(wrong, files) if problem]
        are = "is" if len(problems) == 1 else "are"
        of = f"{len(problems)} of {counted(len(files), 'file')}"
        raise_listed(f"{self._folder}: {of} {are} bad; use another checkpoint:", problems)

    def _load(self, file: Path) -> dict[str, Any]:
        with self._lock:
            if file not in self._files:
                self._files[file] = load_safely(file)
            return self._files[file]

    def _optim(self, file: Path) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._load(file)[OPTIMIZER_STATE_DICT]
        return state

    def _flat(self, rank: int, flat: int | str) -> torch.Tensor:
        """Rank `rank`'s 1-D tensor of an optimizer group, or its partition of a frozen parameter."""
        tensor: torch.Tensor
        if isinstance(flat, str):
            tensor = self._load(self._model_files[rank])[FROZEN_PARAM_FRAGMENTS][self._prefix + flat]
            return tensor
        optim = self._optim(self._optim_files[rank])
        if self._slot == "fp32":
            tensor = optim[FP32_FLAT_GROUPS if self.stage == 3 else SINGLE_PARTITION_OF_FP32_GROUPS][flat]
        else:
            tensor = self._adam(rank)[flat][self._slot]
        return tensor.detach()

    def _adam(self, rank: int) -> dict[int, dict[str, Any]]:
        """AdamW's own state on a rank: step count and moments, by flat tensor, at stage 0 by parameter."""
        state: Mapping[str, Any]
        if self.stage == 0:
            state = self._load(self._model_files[0])["optimizer"]
        else:
            state = self._optim(self._optim_files[rank])[
                OPTIMIZER_STATE_DICT if self.stage == 3 else BASE_OPTIMIZER_STATE
            ]
        states: dict[int, dict[str, Any]] = state["state"]
        return states

    def _find_places(self) -> dict[str, _Place]:
        if self.stage == 0:
            return {}
        places: dict[str, _Place] = {}
        optim = self._optim(self._optim_files[0])
        for rank, group, shapes in self._shapes():
            offset = 0
            if self.stage < 3:
                saved = optim[SINGLE_PARTITION_OF_FP32_GROUPS][group].numel()
                # ZeRO's optimizer cuts the padding off what it saves, BF16_Optimizer does not.
                cut = int(optim[GROUP_PADDINGS][group]) if ZERO_STAGE in optim else 0
                paddings = (
                    optim[PARAM_ALIGNMENT_PADDINGS][group] if PARAM_ALIGNMENT_PADDINGS in optim else [0] * len(shapes)
                )
            for index, (name, shape) in enumerate(shapes.items()):
                numel, ours = math.prod(shape), name.removeprefix(self._prefix)
                if self.stage == 3:
                    place = self._partitioned(name, shape, group, rank, base=offset)
                    offset += place.period
                else:
                    every = range(self.world_size)
                    place = _Place(tuple(shape), every, group, shift=offset, period=saved + cut, base=0)
                    offset += numel + paddings[index]
                if name.startswith(self._prefix):
                    places.setdefault(ours, place)
        return places

    def _shapes(self) -> Iterable[tuple[int, int, Mapping[str, Any]]]:
        """Names and shapes of the optimizer's groups: a rank, one of its groups' number, what is in it.

        Of each rank of the first that share the experts: its own names of them, and the others' of all else.
        """
        for rank in range(self.expert_parallel_size):
            for group, shapes in enumerate(self._load(self._model_files[rank])[PARAM_SHAPES]):
                yield rank, group, shapes

    def _partitioned(self, name: str, shape: Any, flat: int | str, rank: int, base: int) -> _Place:
        """Of a parameter at stage 3 that `rank` names."""
        experts = ".mlp.experts." in name
        ranks = range(rank, self.world_size, self.expert_parallel_size) if experts else range(self.world_size)
        return _Place(tuple(shape), ranks, flat, shift=0, period=-(-math.prod(shape) // len(ranks)), base=base)

    def _find_frozen_and_buffers(self) -> None:
        state = self._load(self._model_files[0])
        module = state["module"]
        if self.stage == 3:
            for rank in range(self.expert_parallel_size):
                frozen = self._load(self._model_files[rank]).get(FROZEN_PARAM_SHAPES) or {}
                for name, shape in frozen.items():
                    if name.startswith(self._prefix):
                        ours = name.removeprefix(self._prefix)
                        self._places.setdefault(ours, self._partitioned(name, shape, ours, rank, base=0))
            module = {name: module[name] for name in state[BUFFER_NAMES] if name in module}
        for name, tensor in module.items():
            ours = name.removeprefix(self._prefix)
            if name.startswith(self._prefix) and ours not in self._places:
                self._whole[ours] = tensor.detach().contiguous()

    def _find_whole_moments(self) -> None:
        names = self._load(self._model_files[0]).get(OPTIMIZER_NAMES)
        if names is None:  # saved by others
            raise UserError(
                f"{self.path}: stage 0 does not record whose {self._slot} is whose; train with stage 1 to 3"
            )
        for index, name in enumerate(names):
            if name.startswith(self._prefix):
                self._whole[name.removeprefix(self._prefix)] = self._adam(0)[index][self._slot]
