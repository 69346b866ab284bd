"""Where records come from and how they become batches: sources, text, loader."""
