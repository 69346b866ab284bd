"""Heads of scores on a decoder: classification and regression of texts, and rewards."""
