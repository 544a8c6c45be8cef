"""The kernels stand alone: jax and NumPy, nothing of the trainer or its libraries."""

import subprocess
import sys


def test_kernels_import_neither_the_trainer_nor_its_libraries():
    program = (
        "import sys, clipa_kernels\n"
        "unwanted = {'flax', 'optax', 'orbax', 'clipa_fast', 'matplotlib', 'PIL'} & set(sys.modules)\n"
        "sys.exit(str(unwanted) if unwanted else 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
