"""The inverse scaling law, measured: how much accuracy fewer tokens cost, by model size, in the data at hand."""
