"""Everything that does not need a cluster. No module here imports ray."""
