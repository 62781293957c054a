"""Published claims beside what the model says of the same setting."""
