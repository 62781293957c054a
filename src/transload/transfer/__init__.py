"""The bytes of a KV cache: how they lie in memory and how they cross from worker to worker."""
