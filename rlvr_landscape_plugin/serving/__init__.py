"""The live server: what runs inside vLLM (engine, endpoint) and what talks to it (client, launch).

`engine.py` and `endpoint.py` are imported by vLLM through its entry points and may import torch and vllm; `client.py`
and `launch.py` run in the sweep and import neither.
"""
