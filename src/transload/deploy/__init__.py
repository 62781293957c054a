"""Deployment file -> pools -> placement."""
