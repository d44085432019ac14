"""What sending gradients in bf16 costs: error of one reduction against fp64, by simulation on one process.

python -m benchmarks.reduce_error     seconds on a CPU; the table of benchmarks/RESULTS.md
"""

import argparse

import torch
from torch import Tensor

ELEMENTS, PER_NODE = 2**14, 8


def once_per_node(gradients: Tensor) -> Tensor:
    """[M, G, n] bf16: each node's sum in fp32, rounded, summed in fp32."""
    return gradients.sum(1, dtype=torch.float32).bfloat16().sum(0, dtype=torch.float32)


def ring(gradients: Tensor) -> Tensor:
    """[M, G, n] bf16, rounded at every hop."""
    hops = gradients.flatten(0, 1)
    total = hops[0]
    for gradient in hops[1:]:
        total = (total.float() + gradient.float()).bfloat16()
    return total.float()


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 8, 32, 128])
    print(
        "| nodes of 8 | signal | one exchange, fp32 sums | once per node | bf16 ring |\n| --- | --- | --- | --- | --- |"
    )
    for nodes in parser.parse_args().nodes:
        for signal in (0.0, 1.0):  # of what ranks have in common, in units of their noise
            generator = torch.Generator().manual_seed(nodes)
            common = signal * torch.randn(ELEMENTS, generator=generator)
            noise = torch.randn(nodes, PER_NODE, ELEMENTS, generator=generator)
            gradients = (common + noise).bfloat16()
            exact = gradients.double().sum((0, 1))
            one = gradients.sum((0, 1), dtype=torch.float32)
            off = [error(found, exact) for found in (one, once_per_node(gradients), ring(gradients))]
            print(f"| {nodes} | {signal:g} | " + " | ".join(f"{value:.1e}" for value in off) + " |")


if __name__ == "__main__":
    main()
