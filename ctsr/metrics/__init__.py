"""How close a thin volume is to the truth, and to the measurement."""
