"""PyTorch exported programs on the CPU.

``archive`` reads the file, ``schema`` types what stands in it, ``shapes`` its sizes, ``routine``
executes its graph, ``engine`` is the engine, ``kinds`` what the entry point names.
"""
