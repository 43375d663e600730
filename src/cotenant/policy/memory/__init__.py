"""The memory of devices: who holds how much of it, who may have more, and who gives it."""
