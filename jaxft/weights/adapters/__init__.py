"""Adapters: LoRA files of PEFT, diffusers and kohya, read and written."""
