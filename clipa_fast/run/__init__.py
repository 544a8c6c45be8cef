"""Keep a run's folder: config, tokenizer, checkpoints, metrics; check a run before it starts."""
