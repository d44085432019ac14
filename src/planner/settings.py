"""What decides a run's memory and time, as the planner takes it from a config; with the ranks' arithmetic."""

from dataclasses import dataclass, replace
from typing import Any

from src.errors import UserError
from src.models.deepseek_v3.sizes import Sizes, reach
from src.planner import rates
from src.strategies.parallel_dims import ParallelDims
from src.strategies.zero_limits import STRATEGY, check_goes_with
from src.units import counted

OPTIONS = {  # field: its name in the config
    "nodes": "trainer.num_nodes",
    "gpus": "trainer.devices",
    "stage": f"{STRATEGY}stage",
    "sp": f"{STRATEGY}sequence_parallel_size",
    "ep": f"{STRATEGY}expert_parallel_size",
    "offload_optimizer": f"{STRATEGY}offload_optimizer",
    "offload_parameters": f"{STRATEGY}offload_parameters",
    "reduce_bucket": f"{STRATEGY}reduce_bucket_size",
    "reduce_dtype": f"{STRATEGY}reduce_dtype",
    "batch_size": "data.batch_size",
    "max_length": "data.max_length",
    "num_workers": "data.num_workers",
    "accumulate": "trainer.accumulate_grad_batches",
    "activation_checkpointing": "model.activation_checkpointing",
    "attention_output": "model.attention_output",
    "layer_input": "model.layer_input",
    "attention_kernel": "model.attention_kernel",
    "experts_per_shard": "model.experts_per_shard",
    "checkpoint_every": "checkpoint.every_n_train_steps",
    "keep": "checkpoint.keep",
    "async_save": "checkpoint.async_save",
    "document": "document_length",
}
_POSITIVE = ("sp", "ep", "batch_size", "accumulate", "nodes", "gpus", "max_length", "document")


@dataclass(frozen=True)
class Settings:
    """One training run.

    gpus: per node. batch_size: packed rows of max_length tokens in a micro-step of a data-parallel rank.
    document: tokens per document, which attention's time depends on. param_bytes: 2 in bf16, 4 in fp32.
    trained: part of the parameters that `freeze` leaves to be trained.
    checkpoint_every: optimizer steps; 0: at the end only. weights_kept: `weights.keep`; 0: none are saved.
    export: whether the run exports at its end. uncounted: what takes time in the run and in no plan.
    imbalance: where ranks share the experts, the busiest rank's rows over the mean.
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
        for field in _POSITIVE:
            value = getattr(self, field)
            whole = isinstance(value, int) or field == "document"
            if not whole or isinstance(value, bool) or not value > 0:
                raise UserError(f"{OPTIONS[field]} is {value!r}; it must be a positive integer.")
        self.dims.check_experts(self.sizes.n_routed_experts)
        for option, on in (
            ("offload_parameters", self.offload_parameters),
            ("expert_parallel_size above 1", self.ep > 1),
            ("reduce_dtype bf16", self.reduce_dtype == "bf16"),
        ):
            if on:
                check_goes_with(option, {"stage": self.stage}, {})
        heads = self.sizes.num_attention_heads
        if heads % self.sp:
            raise UserError(f"num_attention_heads {heads} is not a multiple of sequence_parallel_size {self.sp}.")

    # -- ranks --------------------------------------------------------------------------------------------------------

    @property
    def dims(self) -> ParallelDims:
        return ParallelDims(self.world, self.sp, ep=self.ep, per_node=self.gpus)

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
    def holders_per_node(self) -> int:
        """Ranks of a node that have the same experts."""
        return self.dims.holders_per_node

    @property
    def halves(self) -> bool:
        """Whether experts' gradients travel in bf16."""
        return self.reduce_dtype == "bf16" and self.param_bytes == 2 and self.holders > 1

    @property
    def two_exchanges(self) -> bool:
        """Whether those gradients travel within nodes first, and their sums between nodes."""
        return self.halves and 1 < self.holders_per_node < self.holders

    def link(self, ranks: int) -> str:
        """The rate of `Cluster` at which a group of so many consecutive ranks exchanges."""
        return "exchange_intra_node_gb_s" if ranks <= self.gpus else "nccl_inter_node_gb_s"

    @property
    def zero_link(self) -> str:
        """The rate of `Cluster` at which ZeRO gathers over the world."""
        return "nccl_intra_node_gb_s" if self.nodes == 1 else "nccl_inter_node_gb_s"

    @property
    def load(self) -> float:
        """Rows of experts on the busiest rank over the mean: 1 where every rank computes its own tokens."""
        return self.imbalance if self.ep > 1 else 1.0

    @property
    def reach(self) -> float:
        """Ranks of an EP group that have one of a token's experts, all choices as likely; 0 without such groups."""
        return reach(self.sizes, self.ep) if self.ep > 1 else 0.0

    # -- tokens and parameters ----------------------------------------------------------------------------------------

    @property
    def row_tokens(self) -> int:
        """Of a micro-step of one SP group."""
        return self.batch_size * self.max_length

    @property
    def tokens(self) -> int:
        """Of a micro-step of one rank."""
        return -(-self.row_tokens // self.sp)

    @property
    def targets(self) -> int:
        """Of those, through the head: each twice where the multi-token prediction is trained."""
        return self.tokens * (2 if self.sizes.mtp else 1)

    @property
    def rows_per_step(self) -> int:
        return self.dp * self.batch_size * self.accumulate

    @property
    def partition(self) -> float:
        """Parameters of which a rank holds the weights."""
        return self.sizes.parameters / (self.world if self.stage == 3 else 1)

    @property
    def stepped(self) -> float:
        """Parameters that a rank's optimizer updates."""
        return self.sizes.parameters * self.trained / (self.world if self.stage else 1)

    @property
    def experts_per_shard(self) -> int:
        return self.sizes.experts_per_shard

    # -- other settings -----------------------------------------------------------------------------------------------

    def but(self, **changes: Any) -> "Settings":
        if (experts := changes.pop("experts_per_shard", None)) is not None:
            changes["sizes"] = replace(self.sizes, experts_per_shard=experts)
        return replace(self, **changes)

    def arguments(self, asked: "Settings") -> str:
        """The command-line arguments that make `asked` these settings."""
        return " ".join(
            argument(field, getattr(self, field))
            for field in OPTIONS
            if getattr(self, field) != getattr(asked, field)
            or (field == "experts_per_shard" and self.ep != asked.ep)  # 'auto' takes another number with another ep
        )

    def options(self) -> str:
        """What the search varies, for people."""
        offload = "optimizer" if self.offload_optimizer else "nothing"
        offload = "optimizer and parameters" if self.offload_parameters else offload
        groups = f"SP {self.sp}, EP {self.ep}" if self.ep > 1 else f"SP {self.sp}"
        groups += ", reduce_dtype bf16" if self.reduce_dtype == "bf16" else ""
        return (
            f"{counted(self.nodes, 'node')}, {groups}, batch {self.batch_size}, accumulate {self.accumulate}, "
            f"offload {offload}, attention_output {self.attention_output}, layer_input {self.layer_input}, "
            f"experts_per_shard {self.experts_per_shard}"
        )


def argument(field: str, value: object) -> str:
    """A setting as an argument of the command line."""
    return f"--{OPTIONS[field]} {str(value).lower()}"
