"""Parts of `benchmarks/transport.py`: prompts nobody calibrated on, real prompts with the real vocabulary, speed."""
