"""The language-model task."""
