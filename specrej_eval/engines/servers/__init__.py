"""The engine over a server that runs already: vLLM's, SGLang's, or any with OpenAI's completions."""
