"""What a run leaves behind, and reading it back.

Names of files, checkpoints, the record of settings, galleries, the model card, the hub.
"""
