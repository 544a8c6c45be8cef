"""`python -m bench NAME ...` runs one measurement, or draws the report."""

import importlib
import sys
from pathlib import Path

# A measurement is a module here with a main of its own; what they import has none.
MEASUREMENTS = tuple(
    sorted(
        path.stem
        for path in Path(__file__).parent.glob("*.py")
        if not path.stem.startswith("__") and "\ndef main(argv" in path.read_text(encoding="utf-8")
    )
)


def main() -> None:
    """Hands the rest of the command line to the measurement it names."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in MEASUREMENTS:
        sys.exit(f"usage: python -m bench NAME ...; accepted names: {', '.join(MEASUREMENTS)}")
    importlib.import_module(f"bench.{name}").main(sys.argv[2:])


main()
