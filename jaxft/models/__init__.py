"""One file per architecture: its config, its modules, its weight table."""
