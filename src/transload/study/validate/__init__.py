"""Real against virtual: one deployment and load, on this machine and in virtual time, and how far they are apart."""
