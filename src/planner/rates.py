"""Kernel rates of one H100, measured (benchmarks/RESULTS.md, section 2) and interpolated between its rows.

Rates are useful operations/s as src/models/deepseek_v3/flops.py counts them, so that a forward's time is its operations
over the forward's rate. Another GPU's are scaled by its own product of 8192 x 8192 matrices; here it reached 737 to
778e12 operations/s.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence

Table = Sequence[tuple[float, float]]  # (size, 1e12 operations/s), sizes rising

# "Attention (192, 128), packed": by tokens per document. The rows 64 x 512, 8 x 4096, 1 x 8192, 1 x 32768.
ATTENTION_FORWARD: dict[str, Table] = {
    "flash_attn_4": ((512, 189), (4096, 600), (8192, 603), (32768, 716)),
    "varlen": ((512, 115), (4096, 229), (32768, 275)),
    "sdpa": ((512, 48), (4096, 454), (32768, 567)),
}
ATTENTION_BACKWARD: dict[str, Table] = {
    "flash_attn_4": ((512, 118), (4096, 328), (8192, 334), (32768, 398)),
    "varlen": ((512, 75), (4096, 146), (32768, 185)),
    "sdpa": ((512, 3.6), (4096, 133), (32768, 375)),
}
# "Experts", the whole block from dispatch to combine: by rows per expert, tokens x 8 / 256. 8,192 to 32,768 tokens are
# the table's rows; 128 rows per expert are "What one SP rank computes", 8 x 4096 at SP = 8, less what is not experts.
EXPERTS_FORWARD: Table = ((128, 245), (256, 377), (512, 454), (1024, 522))
EXPERTS_BACKWARD: Table = ((128, 200), (256, 295), (512, 362), (1024, 415))  # gate_up computed again, counted once
# "A whole MoE layer": 75 ms of other products at 32,768 tokens, recomputation included.
PRODUCTS = 697.0
# "Projection to the vocabulary and cross-entropy", forward and both gradients: 8,192 and 16,384 tokens.
HEAD = 616.0
# The same layer: what is neither attention nor products nor the experts' block, 103 - 75 ms and 91 - 75 ms of 32,768
# tokens of 7,168: norms, residuals, rotary embedding, assembly of heads, the route. Bytes through memory, so it grows
# with the width. Seconds per token and unit of hidden size.
ELEMENTWISE = 20e-3 / 32768 / 7168
LAUNCH = 1.0e-3  # seconds per layer, forward and backward, however few its tokens: 1 x 8192 against 1 x 32768
# The parts of that time in each half of a layer (attention, MLP): forward, and again where it is recomputed; in their
# backward passes. 1.15 total with recomputation, 0.85 without. Apportioned, not measured one by one; with them the
# seven rows of "A whole MoE layer" are planned within -0.7 and +3.2 %.
ELEMENTWISE_FORWARD, ELEMENTWISE_BACKWARD_ATTENTION, ELEMENTWISE_BACKWARD_MLP = 0.15, 0.30, 0.25

# "What NCCL takes from the computation beside it": how many times as long the computation takes beside a gather or a
# reduction, and that beside it. Attention's second figure is worked out from the measurement: 4 forward, 6 backward.
EXPERTS_BESIDE = (1.60, 1.39)
PRODUCTS_BESIDE = (1.32, 1.50)
ATTENTION_BESIDE = (1.18, 5.5)

# "What the host needs": 61 narrow layers of 64 tokens as rank 0 of 256, for which the GPU has next to nothing to do.
# For a visit of a parameter: hooks, gather, release, reduction and launches; what more a layer of experts needs, in
# each of forward, recomputation and backward; what more a shard needs, in forward and in backward.
HOST_PARAMETER, HOST_ROUTE, HOST_SHARD = 0.75e-3, 3.3e-3, 1.0e-3
HOST_PARAMETER_ALONE = 0.4e-3  # of one rank, which gathers nothing: assumed

SKEW = 0.01  # "Four GPUs of one host": of a layer's time, what its six SP exchanges wait for the slowest rank

# Where ranks share the experts: the busiest rank's rows over the mean, assumed; the others wait for it.
IMBALANCE = 1.15

# Latency of a collective, assumed: seconds, total, per node and per rank of its group.
COLLECTIVE, COLLECTIVE_NODE, COLLECTIVE_RANK = 20e-6, 5e-6, 1e-6


def latency(ranks: int, nodes: int = 0) -> float:
    """nodes: of a group that goes from node to node."""
    return COLLECTIVE + COLLECTIVE_NODE * nodes + COLLECTIVE_RANK * ranks


def interpolate(table: Table, size: float) -> float:
    """By the logarithm of the size; above the last row its rate, below the first row its time."""
    if size <= table[0][0]:
        return table[0][1] * size / table[0][0]
    if size >= table[-1][0]:
        return table[-1][1]
    index = bisect_right([row[0] for row in table], size)
    (low, slow), (high, fast) = table[index - 1], table[index]
    return slow + (fast - slow) * math.log(size / low) / math.log(high / low)
