"""Text encoders: networks that embed a prompt."""
