"""sample.py --serve: a local HTTP server with OpenAI's completions API and a page to try prompts."""
