"""A loaded model behind HTTP: OpenAI's chat completions, and a page that shows who wrote each token (docs/serve.md)."""
