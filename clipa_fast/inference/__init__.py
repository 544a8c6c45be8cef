"""Trained models in use: loading, encoding, classifying."""
