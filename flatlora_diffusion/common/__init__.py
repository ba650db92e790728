"""What everything above shares: errors, files and locks, seeds, devices, signals, command lines.

It knows nothing of LoRA or SDXL. Here `files` is how a file is written; in other wings it is which files
there are: `app.files` those that the page hands out, `sheet.files` those that a sheet is laid out from.
"""
