"""Pages that a person reads: samples, the report of a run, the card of an export."""
