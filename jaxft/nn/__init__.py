"""Parts of models: modules with their parameters, and the LoRA slot."""
