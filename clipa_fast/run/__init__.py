"""What a run's folder holds: config, tokenizer, checkpoints, metrics, and what is checked before it starts."""
