"""sample.py --serve: local HTTP server with OpenAI's completions API and a web page."""
