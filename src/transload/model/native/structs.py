"""The structs that the kernels and Python share, as ctypes sees them.

Owns their fields, in the order of the C sources; `library.py` compares the sizes when it loads a build. Computes
nothing. Imports no torch.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_char_p, c_double, c_int, c_int64, c_uint64, c_void_p

MOST_SLOTS = 64
"""Entries of a ring; `MOST_SLOTS` of ring.h."""


class LinearStruct(Structure):
    """`struct linear` of tiles.h."""

    _fields_ = (
        ("num_outputs", c_int64),
        ("num_inputs", c_int64),
        ("kind", c_int64),
        ("split", c_int64),
        ("weight", c_void_p),
        ("bias", c_void_p),
    )


class LayerStruct(Structure):
    """`struct layer` of llama.c."""

    _fields_ = (
        ("input_norm", c_void_p),
        ("query_norm", c_void_p),
        ("key_norm", c_void_p),
        ("ffn_norm", c_void_p),
        ("qkv", LinearStruct),
        ("output", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("window", c_int64),
    )


class ModelStruct(Structure):
    """`struct model` of llama.c."""

    _fields_ = (
        ("hidden_size", c_int64),
        ("intermediate_size", c_int64),
        ("num_layers", c_int64),
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_dim", c_int64),
        ("vocab_size", c_int64),
        ("kind", c_int64),
        ("norm_eps", c_double),
        ("final_norm", c_void_p),
        ("embedding", c_void_p),
        ("head", LinearStruct),
        ("layers", POINTER(LayerStruct)),
    )


class StepStruct(Structure):
    """`struct step` of llama.c, with `struct cache` of attention.h at its end."""

    _fields_ = (
        ("num_rows", c_int64),
        ("num_spans", c_int64),
        ("num_kept", c_int64),
        ("token_ids", c_void_p),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("positions", c_void_p),
        ("row_blocks", c_void_p),
        ("spans", c_void_p),
        ("blocks", c_void_p),
        ("kept", c_void_p),
        ("kept_spans", c_void_p),
        ("cache_base", c_void_p),
        ("cache_kind", c_int64),
        ("cache_num_layers", c_int64),
        ("cache_num_kv_heads", c_int64),
        ("cache_block_size", c_int64),
        ("cache_head_dim", c_int64),
    )


class CallerStruct(Structure):
    """`struct caller_rows` of split.h."""

    _fields_ = (("rows", c_void_p), ("num_rows", c_int64), ("out", c_void_p))


class RingStruct(Structure):
    """`struct ring` of ring.h."""

    _fields_ = (
        ("words", c_void_p),
        ("num_slots", c_int64),
        ("posted_at", c_int64),
        ("news_at", c_int64),
        ("dozes_at", c_int64),
        ("peer_dozes_at", c_int64),
        ("out_entries", c_int64),
        ("in_entries", c_int64),
        ("out_headers", c_void_p),
        ("out_rows", c_void_p),
        ("in_headers", c_void_p),
        ("slot_bytes", c_int64),
        ("most_header_bytes", c_int64),
        ("most_sent_bytes", c_int64),
        ("most_row_bytes", c_int64),
        ("num_posted", c_uint64),
        ("num_seen", c_uint64),
        ("found", c_uint64 * (3 * MOST_SLOTS)),
        ("num_found", c_int64),
        ("problem", c_int64),
    )


class MethodStruct(Structure):
    """`PyMethodDef` of Python, `struct method` of python.h."""

    _fields_ = (("name", c_char_p), ("call", c_void_p), ("flags", c_int), ("explanation", c_char_p))


PYTHON_FUNCTIONS = (
    "PyLong_AsVoidPtr",
    "PyLong_AsLongLong",
    "PyFloat_AsDouble",
    "PyBytes_AsStringAndSize",
    "PyErr_Occurred",
    "PyErr_SetString",
    "PyLong_FromLongLong",
    "PyBool_FromLong",
    "PyFloat_FromDouble",
    "PyBytes_FromStringAndSize",
    "PyTuple_New",
    "PyTuple_SetItem",
    "Py_DecRef",
    "PyEval_SaveThread",
    "PyEval_RestoreThread",
)
"""What kernels call of Python, all of its stable interface."""


class PythonStruct(Structure):
    """`struct python` of python.h."""

    _fields_ = (*((name, c_void_p) for name in PYTHON_FUNCTIONS), ("assertion_error", c_void_p))


TWINS: dict[str, type[Structure]] = {
    "linear": LinearStruct,
    "layer": LayerStruct,
    "model": ModelStruct,
    "step": StepStruct,
    "caller_rows": CallerStruct,
    "ring": RingStruct,
    "method": MethodStruct,
    "python": PythonStruct,
}
"""By their names in C."""
