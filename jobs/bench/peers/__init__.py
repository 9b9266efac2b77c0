"""The same work by imgbatch and by its peers: ``python -m jobs.bench.peers``."""
