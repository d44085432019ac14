"""The samples of some files and the rows that training or validation makes of them."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from .cache import TokenCache, open_or_build
from .files import expand
from .formats import check_fields
from .mixture import Mixture, check_weights, mix
from .packing import PackedRows, one_sample_a_row, pack
from .tokenization import TokenizeOptions
from .tokenizer import load_tokenizer


@dataclass(frozen=True)
class PackedSet:
    """Samples, rows and, if files are mixed by weight, an epoch's share of the rows."""

    cache: TokenCache
    rows: PackedRows
    mixture: Mixture | None = None

    @property
    def fingerprint(self) -> str:
        """Digest of the files' bytes, the tokenizer, the options, and the mixture."""
        if self.mixture is None:
            return self.cache.fingerprint
        parts = [(part.weight, part.rows) for part in self.mixture.parts]
        return hashlib.sha256(f"{self.cache.fingerprint} {parts}".encode()).hexdigest()[:32]

    @property
    def rows_an_epoch(self) -> int:
        return len(self.rows) if self.mixture is None else len(self.mixture)

    def fill(self, max_length: int) -> float:
        """Tokens over the rows' capacity."""
        return float(self.cache.lengths.sum(dtype="int64")) / (len(self.rows) * max_length)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint and a logger record of it; counts are of the files, a mixture's rows of an epoch."""
        facts: dict[str, Any] = {
            "hash": self.fingerprint,
            "samples": len(self.cache),
            "tokens": int(self.cache.lengths.sum(dtype="int64")),
            "targets": int(self.cache.targets.sum(dtype="int64")),
            "rows": len(self.rows),
        }
        if self.cache.statistics.skipped:
            facts["skipped"] = self.cache.statistics.skipped
        if self.mixture is not None:
            facts["mixture"] = {
                part.entry: {"weight": part.weight, "rows": part.rows, "rows_an_epoch": part.rows_an_epoch}
                for part in self.mixture.parts
            }
        return facts


def pack_samples(cache: TokenCache, options: TokenizeOptions, packing: bool) -> PackedSet:
    """The rows of all samples, packed together."""
    rows = pack(cache.lengths, options.max_length) if packing else one_sample_a_row(len(cache))
    return PackedSet(cache, rows)


def mix_samples(
    cache: TokenCache, options: TokenizeOptions, packing: bool, entries: Sequence[str], weights: Sequence[float]
) -> PackedSet:
    """The rows of each entry (a file or a glob), packed by itself, mixed by weight.

    Raises:
        ValueError: as `mixture.mix`.
    """
    entry_of = {path: index for index, entry in enumerate(entries) for path in expand([entry])}
    # [samples] -> entry of each
    owners = np.asarray([entry_of[path] for path in cache.paths])[cache.files]
    packed = []
    for index in range(len(entries)):
        samples = np.flatnonzero(owners == index)
        alone = pack(cache.lengths[samples], options.max_length) if packing else one_sample_a_row(len(samples))
        packed.append(PackedRows(samples[alone.samples], alone.offsets))
    return PackedSet(cache, *mix(entries, weights, packed, cache.lengths, cache.targets))


def pack_files(settings: Mapping[str, Any]) -> PackedSet:
    """The rows that training makes of the arguments of SFTDataModule, without Lightning.

    Raises:
        ValueError: as SFTDataModule's constructor and `setup`.
    """
    named = {field.name: settings[field.name] for field in fields(TokenizeOptions)}
    options = TokenizeOptions(**named | {name: named[name] or {} for name in ("fields", "chat_template_kwargs")})
    check_fields(options.fields)
    files, weights, folder = settings["train_files"], settings["train_weights"], settings["cache_dir"]
    tokenizer = load_tokenizer(settings["tokenizer"])
    cache = open_or_build(expand(files), tokenizer, options, Path(folder).expanduser() if folder else None)
    if weights is None:
        return pack_samples(cache, options, settings["packing"])
    check_weights(weights, files)
    return mix_samples(cache, options, settings["packing"], files, weights)
