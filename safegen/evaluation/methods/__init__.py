"""Erasing methods on equal footing: small implementations of their papers' equations behind one protocol."""

from safegen.evaluation.methods.base import Drawer, Eraser, Kind, Method, Target, Task
from safegen.evaluation.methods.registry import METHODS, find

__all__ = ["METHODS", "Drawer", "Eraser", "Kind", "Method", "Target", "Task", "find"]
