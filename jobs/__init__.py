"""Entry points for a plain ``ray job submit``, recipes, benchmarks and their dated results."""
