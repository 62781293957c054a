"""Tests of the KV transport: real memory, real sockets, real processes."""
