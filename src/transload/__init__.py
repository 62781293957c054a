"""Transload: disaggregated LLM inference, on real workers and in virtual time.

Importing this package does not import torch.
"""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """`transload.simulate`, without loading it for everybody who only wants the version."""
    if name == "simulate":
        from transload.study.simulate import simulate

        return simulate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
