"""Facilitated transport: how far each membrane opens for each prompt, and why."""
