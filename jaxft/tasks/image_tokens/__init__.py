"""The image-token task."""
