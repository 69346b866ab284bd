"""The autoencoder task."""
