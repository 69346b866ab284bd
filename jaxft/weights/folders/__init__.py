"""Folders: models as transformers, diffusers and their authors lay them out."""
