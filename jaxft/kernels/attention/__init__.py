"""Attention: one function, and the kernels that compute it."""
