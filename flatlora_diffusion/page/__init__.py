"""The tabs of the app, one a module: only these modules and `app.py` import gradio."""
