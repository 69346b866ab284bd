"""Guards of a run and its files: names inside a folder, fingerprints, locks, signals."""
