"""Benchmarks: ``python -m jobs.bench.NAME``, from the root of the repository; without arguments, the short form."""
