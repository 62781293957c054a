"""What one step of one worker costs: seconds, bytes, memory, power and price, from a chip, a model and a split."""
