"""The files that a policy refers to: where membranes lie on disk."""
