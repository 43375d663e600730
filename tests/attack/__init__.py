"""Clients that mean harm, each on one loopback connection and for a bounded time."""
