"""What runs inside a vLLM worker: all that touches torch and vLLM internals. Import nothing of the sweep here."""
