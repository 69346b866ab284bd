"""Certificates of decoders with another head than that of the vocabulary."""
