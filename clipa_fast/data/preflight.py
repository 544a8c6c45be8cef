"""What a look at the shards' indexes says about a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence

from clipa_fast.config import DataConfig, StageConfig
from clipa_fast.data.counts import describe
from clipa_fast.data.order import Order
from clipa_fast.data.source import EncodedSource, Source


def preflight(source: Source, data: DataConfig, stages: Sequence[StageConfig], process_count: int = 1) -> list[str]:
    """Lines for the user: what was found, and what will slow the run down.

    Args:
      source: the run's data.
      data: the run's settings of it.
      stages: the run's stages.
      process_count: processes that read.
    """
    if not isinstance(source, EncodedSource):
        return []
    sizes = [int(size) for part in source.parts for size in part]
    gigabytes = source.encoded_bytes() / 1e9
    lines = [f"data: {len(sizes):,} shards, {sum(sizes):,} samples, {gigabytes:,.2f} GB of pictures"]
    if source.skipped:
        lines.append(f"data: bad data skipped: {describe(source.skipped)}")
    if source.noted:
        lines.append(f"data: unusual data used: {describe(source.noted)}")
    if not source.is_remote():
        return lines
    for stage in stages:
        order = Order(len(source), stage.batch_size, 0, source.parts, data.weights or None, data.shuffle_shards)
        if order.lanes < process_count or order.lanes % process_count:
            lines.append(
                f"data: {stage.name}: {len(sizes):,} shards and batches of {stage.batch_size:,} make {order.lanes}"
                f" groups of shards for {process_count} processes, so some will fetch the same shards; a multiple of"
                f" {process_count} needs more shards, or another data.shuffle_shards"
            )
        mixed = len(sizes) if order.lanes == 1 else min(len(sizes), 2 * -(-data.shuffle_shards // process_count))
        needed = mixed * source.encoded_bytes() / len(sizes)
        if needed > source.cache_bytes:
            lines.append(
                f"data: {stage.name}: the shards that a process reads at a time need {needed / 1e9:,.1f} GB,"
                f" data.cache_gb is {source.cache_bytes / 1e9:g}: shards will be fetched again and again"
            )
    return lines
