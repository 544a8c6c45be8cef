"""Training: state, step, loop over stages."""
