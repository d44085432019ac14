"""Which settings of ZeRO shared experts refuse, before anything is built."""

from typing import Any

import pytest

from src.strategies import DeepSpeedSPStrategy


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stage": 2}, "needs ZeRO stage 3, stage is 2"),
        ({"offload_params_device": "nvme", "offload_parameters": True}, "does not go with offload_param to nvme"),
        ({"offload_optimizer_device": "nvme", "offload_optimizer": True}, "does not go with offload_optimizer to nvme"),
        ({"config": {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}}, "zero_hpz_partition_size 8"),
        (
            {"config": {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}},
            "zero_quantized_gradients True",
        ),
        ({"config": {"zero_optimization": {}}}, "needs ZeRO stage 3, stage is None"),
        ({"config": {}}, "needs ZeRO stage 3, stage is 0"),
    ],
)
def test_settings_that_nobody_has_tried_are_refused(settings: dict[str, Any], said: str) -> None:
    DeepSpeedSPStrategy(**settings)
    with pytest.raises(ValueError, match=said):
        DeepSpeedSPStrategy(expert_parallel_size=2, **settings)
    DeepSpeedSPStrategy(expert_parallel_size=2)
