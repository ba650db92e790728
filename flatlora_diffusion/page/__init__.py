"""The app's page: a gradio interface to the engine in `studio`."""
