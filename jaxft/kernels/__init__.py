"""Kernels: the only room that asks which device it is, a reference beside every tuned path."""
