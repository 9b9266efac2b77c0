"""The engines. The only package that imports ray; ``local`` and ``job`` do without until they need it."""
