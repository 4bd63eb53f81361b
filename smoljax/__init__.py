"""SmolLM and SmolLM2 in JAX and Flax. `import smoljax` is light: JAX is imported with the first name that needs it."""

_EXPORTS = {
    "Compute": "config",
    "Model": "config",
    "SIZES": "config",
    "Train": "config",
    "SmolLM": "model",
    "generate": "generation",
    "load": "weights",
    "load_tokenizer": "weights",
}
__all__ = list(_EXPORTS)


def __getattr__(name: str):
    import importlib

    if name in _EXPORTS:
        return getattr(importlib.import_module(f"smoljax.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'smoljax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_EXPORTS])
