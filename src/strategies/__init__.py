"""Ranks: the DP x SP mesh, the SP collectives, ZeRO, activation checkpointing."""

from .deepspeed_sp import DeepSpeedSPStrategy

__all__ = ["DeepSpeedSPStrategy"]
