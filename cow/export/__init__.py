"""Ways to reach the devices of a mapper from other programs."""
