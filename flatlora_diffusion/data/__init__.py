"""What is trained on: pictures and captions of a folder or a dataset, framed, and their cached latents."""
