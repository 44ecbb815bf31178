"""What may be drawn: the policy document, the concept catalogue, and the two resolved into one plan."""
