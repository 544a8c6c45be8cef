"""The trainer's whole step compiled for several TPUs: its attention kernels, and nothing moved around them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from clipa_fast import profiling
from clipa_fast.config import TowerSize
from clipa_fast.profiling import compile_for_tpu
from clipa_fast.profiling.static.programs import train_step_program, train_step_stage

needs_libtpu = pytest.mark.skipif(not profiling.is_available(), reason="libtpu is not installed")
DEPTH = {"vision": 3, "text": 2}
BATCH = 128


def compiled(attention):
    """A small CLIP at odd lengths, 17 + 9 tokens."""
    model, stage = train_step_stage("Ti/16", 64, 9, BATCH)
    sizes = {name: TowerSize(width=256, depth=depth, mlp_dim=512, num_heads=4) for name, depth in DEPTH.items()}
    model = dataclasses.replace(model, vocab_size=512, embed_dim=128, **sizes)
    program = train_step_program(model, stage, attention, devices=2)
    return compile_for_tpu(
        program.function,
        *program.arguments,
        mesh=program.mesh,
        in_specs=program.in_specs,
        donate_argnums=program.donate_argnums,
    )


@needs_libtpu
@pytest.mark.slow
def test_kernels_run_in_every_block_and_no_activation_is_copied_around_them():
    profile = compiled("tpu")
    kernels = [op for op in profile.select("pallas") if "contrastive" not in op.name]
    assert set(kernels) <= set(profile.within("attention"))
    # Once forward, once more for the backward, and the backward itself; the two towers in loops of their own.
    assert sorted(op.count for op in kernels) == sorted(3 * list(DEPTH.values()))
    in_blocks = [op for op in profile.copies if op.count in DEPTH.values()]
    activations = BATCH // 2 * 17 * 256 * 2
    assert not [op for op in in_blocks if op.hbm_bytes >= op.count * activations]
    # Each device has half of the pairs; their gradients are added up.
    assert "all-reduce" in {collective.opcode for collective in profile.collectives}


@needs_libtpu
@pytest.mark.slow
def test_attention_of_xla_has_no_kernels():
    profile = compiled("xla")
    assert {op.name.split(".")[0] for op in profile.select("pallas")} == {
        "contrastive_statistics",
        "contrastive_gradient",
    }
    assert profile.within("attention")


def test_wrong_input_to_the_measurement_ends_with_one_line():
    command = [sys.executable, "-m", "bench", "train_step_static", "--steps", "B/16"]
    checkout = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: steps: got 'B/16', accepted is PRESET,IMAGE,TEXT,PAIRS such as B/16,112,16,2048\n"
