"""`python -m bench NAME ...` runs one measurement."""

import sys

from bench import train_step

MEASUREMENTS = {"train_step": train_step.main}


def main() -> None:
    """Hands the rest of the command line to the measurement it names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in MEASUREMENTS:
        sys.exit(f"usage: python -m bench NAME ...; accepted names: {', '.join(MEASUREMENTS)}")
    MEASUREMENTS[name](sys.argv[2:])


main()
