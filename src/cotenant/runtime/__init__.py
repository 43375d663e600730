"""The node: turns the world into events and actions into the world; decides nothing."""
