"""`python -m bench NAME ...` runs one measurement."""

import importlib
import sys

MEASUREMENTS = (
    "attention_blocks",
    "attention_static",
    "input",
    "loss_memory",
    "loss_static",
    "train_step",
    "train_step_static",
)


def main() -> None:
    """Hands the rest of the command line to the measurement it names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in MEASUREMENTS:
        sys.exit(f"usage: python -m bench NAME ...; accepted names: {', '.join(MEASUREMENTS)}")
    importlib.import_module(f"bench.{name}").main(sys.argv[2:])


main()
