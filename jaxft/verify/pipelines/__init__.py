"""The networks of pipelines beside those of diffusers and transformers, and their pictures."""
