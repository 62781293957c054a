"""Chips, links and models as data; operations; what they cost."""
