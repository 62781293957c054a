"""The pure machines: no clock, no IO, no threads, no torch, no global random in here."""
