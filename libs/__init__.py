"""Adaptive-depth diffusion. From Python: `from libs import Sampler` (libs/sampling/sampler.py)."""

__all__ = ["Sampler"]


def __getattr__(name: str):
    if name == "Sampler":  # on demand: torch takes seconds to import
        from libs.sampling.sampler import Sampler

        return Sampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
