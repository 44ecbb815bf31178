"""What is measured of an erasing method: pure functions, and the figures of one comparison."""
