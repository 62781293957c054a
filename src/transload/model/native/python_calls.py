"""Functions of the kernels that are called as Python's own are, without ctypes in between.

Owns what Python lends the kernels for that, and how such a function is made. What they do is in the C sources. Imports
no torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_void_p, py_object
from typing import Any

from transload.model.native.structs import PYTHON_FUNCTIONS, PythonStruct


def python_struct() -> PythonStruct:
    """For `transload_use_python`. Raises `AttributeError` if this is not CPython."""
    functions = [ctypes.cast(getattr(ctypes.pythonapi, name), c_void_p).value for name in PYTHON_FUNCTIONS]
    return PythonStruct(*functions, id(AssertionError))


def builtin(method: int, address: int) -> Callable[..., Any]:
    """The function that a `struct method` there describes, called for the struct at `address`.

    Both must outlive it: it looks where they were.
    """
    make = ctypes.PYFUNCTYPE(py_object, c_void_p, py_object, c_void_p)(("PyCFunction_NewEx", ctypes.pythonapi))
    made: Callable[..., Any] = make(method, address, None)
    return made
