"""``cotenant simulate``: policies side by side on a scenario, in virtual time."""
