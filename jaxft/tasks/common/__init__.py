"""Pieces that several tasks share: tokenizers, picture sheets, image metrics."""
