"""Fused softmax attention: public functions, their meaning, one implementation a platform."""
