"""Generation with a decoder: cache, sampling and the loop."""
