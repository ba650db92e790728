"""Everything that is SDXL's: loading a base, encoding, the loss, where the LoRA goes and how it starts."""
