"""Command lines: their options, help, completion, and live line."""
