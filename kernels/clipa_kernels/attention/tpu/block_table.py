"""Settings of the attention kernels, found by `python -m bench attention_blocks`, which rewrites this file.

(chip, dtype, length, head_dim) -> heads, items, lags, spread, passes, loop_registers, keys_across: see
`block_sizes.Settings`. Best static estimate of forward and backward among the candidates tried, at 12 heads, or 16 from
head_dim 80 on, and about 32,768 tokens.
"""

TABLE: dict[tuple[str, str, int, int], tuple[int, int, tuple[int, int], int, int, int, bool]] = {
    ("v5e", "bfloat16", 346, 64): (6, 6, (1, 4), 1, 1, 3000, False),
    ("v5e", "bfloat16", 577, 64): (2, 4, (1, 3), 1, 4, 3000, False),
    ("v6e", "bfloat16", 257, 64): (12, 6, (1, 3), 2, 1, 3000, False),
    ("v6e", "bfloat16", 346, 64): (2, 4, (3, 6), 1, 1, 1500, False),
    ("v6e", "bfloat16", 577, 64): (2, 8, (1, 3), 0, 4, 3000, True),
}
