"""Pictures: decoding, buckets and rows of pixels."""
