"""``cotenant top``: a live picture of a node that can be asked and told things."""
