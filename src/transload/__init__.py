"""Transload: disaggregated LLM inference, on real workers and in virtual time.

Importing this package does not import torch.
"""

__version__ = "0.1.0"
