"""What Cotenant runs on: one file a device kind, behind the Protocol in ``base``."""
