"""Speed of Quernel against what a user would pick instead; ``python -m benchmarks <slug>`` from a checkout."""
