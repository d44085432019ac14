"""GPUs by NVIDIA's data sheets.

Where a card's own rates are not measured, they are the H100's times the ratio of the two data sheets.
"""

from typing import NamedTuple


class Card(NamedTuple):
    """peak: dense bf16, 1e12 operations/s. memory_gib: as CUDA states it. memory_tb_s: of its memory.

    link_gb_s: one way to the other GPUs of a node together; NVLink, or PCIe where the node has no switch.
    pcie_gb_s: one way to the host. nic_gbit: of the NIC beside it. hopper: whether flash-attn-4 runs on it.
    varlen: how many times as fast as on an H100 FlashAttention-2 is, which uses no instructions of Hopper or later.
    """

    peak: float
    memory_gib: float
    memory_tb_s: float
    link_gb_s: float
    pcie_gb_s: float = 64.0
    nic_gbit: float = 400.0
    hopper: bool = True
    varlen: float = 1.0


H100 = Card(989, 79.1, 3.35, 450)
# By a part of the device's name; the first that fits. FlashAttention-2 on an A100: its paper, arXiv 2307.08691, has 225
# of 335 TFLOP/s; on a B200 assumed to be no faster.
CARDS = {
    "B200": Card(2250, 178.4, 8.0, 900, hopper=False),
    "GH200": Card(989, 94.5, 4.0, 450),
    "H200 NVL": Card(835, 139.8, 4.8, 64),
    "H200": Card(989, 139.8, 4.8, 450),
    "H100 NVL": Card(835, 93.1, 3.9, 64),
    "H100 PCIe": Card(756, 79.1, 2.0, 64),
    "H100": H100,
    "H800": Card(989, 79.1, 3.35, 200),
    "H20": Card(148, 95.1, 4.0, 450),
    "A100-SXM4-40GB": Card(312, 39.4, 1.555, 300, 32, 200, False, 0.67),
    "A100-PCIE-40GB": Card(312, 39.4, 1.555, 32, 32, 200, False, 0.67),
    "A100": Card(312, 79.1, 2.04, 300, 32, 200, False, 0.67),
    "A800": Card(312, 79.1, 2.04, 200, 32, 200, False, 0.67),
}


def card_of(name: str) -> Card | None:
    """The card of a device's name; None where it is not in the table."""
    return next((card for part, card in CARDS.items() if part in name), None)
