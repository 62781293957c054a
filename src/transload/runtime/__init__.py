"""Where time passes: the real driver (processes, asyncio) and the virtual one (an event heap)."""
