"""Train CLIP on few tokens: CLIPA and CLIPA-v2 in JAX.

`clipa_fast.load(PATH)` loads a trained model.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipa_fast.inference.loaded_model import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # The command line and data workers import this package too, and must do so without jax.
    if name == "load":
        from clipa_fast.inference.loaded_model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
