"""The attention/FFN split in time: its pipeline, what each side needs, and which ratio pays. Pure arithmetic."""
