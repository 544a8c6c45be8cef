"""The two towers of CLIPA, their sizes, positions and costs."""
