"""Pictures: decoding, aspect-ratio buckets and rows of pixels."""
