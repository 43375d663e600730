"""Demonstrations that come with the command: ``cotenant demo llm``."""
