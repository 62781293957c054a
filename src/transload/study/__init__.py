"""Workloads, load generation and metrics: one code for live and simulated runs."""
