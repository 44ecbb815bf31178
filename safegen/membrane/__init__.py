"""Membranes: low-rank factors that erase one concept, their arithmetic, and the files that hold them."""
