"""Train CLIP on few tokens: CLIPA and CLIPA-v2 in JAX."""
