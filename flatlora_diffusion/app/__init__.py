"""The page that compares methods in a browser: the engine that draws, one module a tab, the server."""
