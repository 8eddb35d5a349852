"""What the benchmarks share: scales, races, their results, peers, goals, charts."""
