#!/usr/bin/env python
"""DreamBooth LoRA training of SDXL with Flat-LoRA. Try --help."""

from flatlora_diffusion.train.__main__ import run

if __name__ == "__main__":
    run()
