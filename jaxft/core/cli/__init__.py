"""Command lines: their options, help, completion, and the names that other trainers use."""
