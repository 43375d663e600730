"""Clients that mean harm, and what a client that behaves sees of them."""
