"""Settings of the attention kernels, found by `python -m bench attention_blocks`, which rewrites this file.

(chip, dtype, length, head_dim) -> heads, items, lags, spread: see `block_sizes.Settings`. Best static estimate of
forward and backward among the candidates tried, at 12 heads, or 16 from head_dim 80 on, and about 32,768 tokens.
"""

TABLE: dict[tuple[str, str, int, int], tuple[int, int, tuple[int, int], int]] = {
    ("v6e", "bfloat16", 346, 64): (2, 4, (3, 6), 1),
    ("v6e", "bfloat16", 577, 64): (12, 6, (1, 3), 2),
}
