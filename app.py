#!/usr/bin/env python
"""Base, LoRA and Flat-LoRA side by side in a browser, for the same prompt and seed. Try --help."""

from flatlora_diffusion.app.__main__ import run

if __name__ == "__main__":
    run()
