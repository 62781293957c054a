"""Calibration: measures this machine, or a live endpoint, and writes what was measured as a chip file."""
