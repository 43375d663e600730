"""Recipes: each makes files out of a parent. To add one, write a class with the attributes of
``Recipe`` in a file of its own, and name it in ``recipes.known``."""
