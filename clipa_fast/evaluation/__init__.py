"""Evaluation on feature arrays: ranking with honest ties, zero-shot classification, retrieval. Imports no jax."""
