"""Grids of pictures, prompts x seeds x methods: the plan, the recipe that draws it again, the drawing."""
