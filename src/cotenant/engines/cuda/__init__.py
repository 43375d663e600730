"""A worker's GPU through the CUDA driver: memory, streams, subsets of its multiprocessors."""
