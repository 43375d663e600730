"""The dashboard: pages for people, rendered here, and what keeps them fresh."""
