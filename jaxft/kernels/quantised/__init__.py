"""Kernels of projections in fewer bits: layouts, encoders and decoders of bitsandbytes."""
