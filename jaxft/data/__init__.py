"""Data: sources of records, encoded texts, pictures, a cache of encoded examples, batches."""
