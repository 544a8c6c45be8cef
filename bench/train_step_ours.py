"""Our side of `python -m bench train_step`: reads a count per line, steps so often, answers with JSON."""

import json
import resource
import sys
import time

from clipa_fast.parallel.cpu_settings import prepare_cpu

prepare_cpu()

import jax  # noqa: E402  (settings first, then jax's client)
import numpy as np  # noqa: E402

from clipa_fast.config import ModelConfig, StageConfig  # noqa: E402
from clipa_fast.training.step import compile_train_step, init_params, init_state  # noqa: E402

image_size, text_length, batch = map(int, sys.argv[1:])
# The peer's convention, so that both compute the same function: exact GELU, stored positions.
model = ModelConfig(preset="S/16", convention="open_clip", scan_unroll=12)
stage = StageConfig(image_size=image_size, text_length=text_length, batch_size=batch, samples=1000 * batch)
state = init_state(init_params(model, image_size, text_length, seed=0), stage)
step = compile_train_step(model, stage, 0, state)
rng = np.random.default_rng(0)
image = rng.integers(0, 256, (batch, image_size, image_size, 3), np.uint8)
text = rng.integers(0, 32_000, (batch, text_length), np.int32)

for line in sys.stdin:
    rows = []
    for _ in range(int(line)):
        faults, start = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.perf_counter()
        state, metrics = jax.block_until_ready(step(state, image, text))
        seconds = time.perf_counter() - start
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        rows.append({"seconds": seconds, "page_faults": faults, "loss": float(metrics["loss"])})
    print(json.dumps(rows), flush=True)
