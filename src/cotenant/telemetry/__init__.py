"""What a node remembers of itself: the journal of decisions, and what can be read out of it."""
