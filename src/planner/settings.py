"""What decides a run's memory and time, gathered from a config's values; ranks' arithmetic included."""

from dataclasses import dataclass, replace
from typing import Any

from src.errors import UserError
from src.models.deepseek_v3.sizes import Sizes
from src.planner import rates
from src.strategies.parallel_dims import ParallelDims
from src.strategies.zero_limits import check_goes_with
from src.units import counted

_POSITIVE = {  # field: its name in the config
    "sp": "trainer.strategy.init_args.sequence_parallel_size",
    "ep": "trainer.strategy.init_args.expert_parallel_size",
    "batch_size": "data.batch_size",
    "accumulate": "trainer.accumulate_grad_batches",
    "nodes": "trainer.num_nodes",
    "gpus": "trainer.devices",
    "max_length": "data.max_length",
    "document": "document_length",
}

SHARD = "model.experts_per_shard"


@dataclass(frozen=True)
class Settings:
    """One training run; names as in the config where it has them.

    gpus: of a node. rows: micro-batch of a data-parallel rank, batch_size packed rows of max_length tokens.
    document: tokens of a document, as far as attention's time goes. param_bytes: 2 in bf16, 4 in fp32.
    trained: part of the parameters that `freeze` leaves to be trained.
    imbalance: where ranks share the experts, the busiest rank's rows over the mean.
    checkpoint_every: optimizer steps, 0 at the end only. weights_kept: `weights.keep`, 0 where none are saved.
    export: whether the end exports. uncounted: what the run spends time on that no plan counts.

    reduce_dtype: of experts' gradients between ranks, fp32 or bf16.

    Raises:
        ValueError: a number is not positive, or numbers do not divide.
    """

    sizes: Sizes
    nodes: int
    gpus: int
    sp: int = 1
    stage: int = 3
    offload_optimizer: bool = False
    offload_parameters: bool = False
    batch_size: int = 1
    max_length: int = 32768
    accumulate: int = 1
    document: float = 32768
    activation_checkpointing: bool = True
    attention_output: str = "recompute"
    layer_input: str = "keep"
    attention_kernel: str = "flash_attn_4"
    param_bytes: int = 2
    trained: float = 1.0
    reduce_bucket: int = 200_000_000
    num_workers: int = 2
    checkpoint_every: int = 100
    keep: int = 2
    async_save: bool = True
    weights_kept: int = 0
    export: bool = False
    uncounted: tuple[str, ...] = ()
    cpu: bool = False
    ep: int = 1
    imbalance: float = rates.IMBALANCE
    reduce_dtype: str = "fp32"

    def __post_init__(self) -> None:
        for field, option in _POSITIVE.items():
            value = getattr(self, field)
            whole = isinstance(value, int) or field == "document"
            if not whole or isinstance(value, bool) or not value > 0:
                raise UserError(f"{option} is {value!r}; it must be a positive integer.")
        self.dims.check_experts(self.sizes.n_routed_experts)
        for option, on in (("expert_parallel_size above 1", self.ep > 1), ("reduce_dtype bf16", self._bf16)):
            if on:
                check_goes_with(option, {"stage": self.stage}, {})
        heads = self.sizes.num_attention_heads
        if heads % self.sp:
            raise UserError(f"num_attention_heads {heads} is not a multiple of sequence_parallel_size {self.sp}.")

    @property
    def dims(self) -> ParallelDims:
        return ParallelDims(self.world, self.sp, ep=self.ep, per_node=self.gpus)

    @property
    def _bf16(self) -> bool:
        return self.reduce_dtype == "bf16"

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    @property
    def dp(self) -> int:
        return self.world // self.sp

    @property
    def holders(self) -> int:
        """Ranks that have the same experts, over which ZeRO-3 partitions these."""
        return self.world // self.ep

    @property
    def halves(self) -> bool:
        """Whether experts' gradients travel in bf16."""
        return self._bf16 and self.param_bytes == 2 and self.holders > 1

    @property
    def holders_per_node(self) -> int:
        """Ranks of a node that have the same experts."""
        return self.dims.holders_per_node

    @property
    def row_tokens(self) -> int:
        """Of a micro-step of one SP group."""
        return self.batch_size * self.max_length

    @property
    def tokens(self) -> int:
        """Of a micro-step of one rank."""
        return -(-self.row_tokens // self.sp)

    @property
    def rows_per_step(self) -> int:
        return self.dp * self.batch_size * self.accumulate

    @property
    def partition(self) -> float:
        """Parameters of which a rank holds the states."""
        return self.sizes.parameters / (self.world if self.stage == 3 else 1)

    def but(self, **changes: Any) -> "Settings":
        return replace(self, **changes)

    def arguments(self, asked: "Settings") -> str:
        """The command-line arguments that make `asked` these settings."""
        mine, theirs = self._varied(), asked._varied()
        if self.ep != asked.ep:
            theirs[SHARD] = "auto"  # maybe: then it is another number with another ep
        return " ".join(f"--{name} {value}" for name, value in mine.items() if value != theirs[name])

    def _varied(self) -> dict[str, str]:
        strategy = "trainer.strategy.init_args."
        values = {
            "trainer.num_nodes": self.nodes,
            _POSITIVE["sp"]: self.sp,
            _POSITIVE["ep"]: self.ep,
            f"{strategy}offload_optimizer": self.offload_optimizer,
            f"{strategy}offload_parameters": self.offload_parameters,
            f"{strategy}reduce_dtype": self.reduce_dtype,
            "data.batch_size": self.batch_size,
            "trainer.accumulate_grad_batches": self.accumulate,
            "model.attention_output": self.attention_output,
            "model.layer_input": self.layer_input,
            SHARD: self.sizes.experts_per_shard,
        }
        return {name: str(value).lower() for name, value in values.items()}

    def options(self) -> str:
        """What the search varies, for people."""
        offload = "optimizer" if self.offload_optimizer else "nothing"
        offload = "optimizer and parameters" if self.offload_parameters else offload
        groups = f"SP {self.sp}, EP {self.ep}" if self.ep > 1 else f"SP {self.sp}"
        groups += ", reduce_dtype bf16" if self._bf16 else ""
        return (
            f"{counted(self.nodes, 'node')}, {groups}, batch {self.batch_size}, accumulate {self.accumulate}, "
            f"offload {offload}, attention_output {self.attention_output}, layer_input {self.layer_input}, "
            f"experts_per_shard {self.sizes.experts_per_shard}"
        )
