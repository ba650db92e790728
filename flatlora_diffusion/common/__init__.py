"""What everything above shares: errors, files and locks, seeds, devices, signals, command lines.

It knows nothing of LoRA or SDXL.
"""
