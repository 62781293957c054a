"""The model's arithmetic in C, compiled on the machine that runs it; torch computes everything where there is none."""
