"""What a run costs before it is paid for: compute, hours, dollars, memory, and what a budget buys. Imports no jax.

Costs are counted as the papers count them and checked against their published figures: `clipa-fast plan --check`.
"""
