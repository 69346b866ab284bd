"""Files: tensors by name in safetensors, GGUF and pickles."""
