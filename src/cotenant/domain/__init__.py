"""The nouns: what a node is made of, as frozen data with no behaviour and no I/O."""
