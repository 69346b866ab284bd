"""Kernels: the only room that chooses by device, with a reference beside each tuned path."""
