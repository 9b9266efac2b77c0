"""The engines. The only package that imports ray; ``local`` and ``job`` do without until they need it."""

import os

# Ray's processes and Ray Data read these once, as they are loaded: what they report by themselves (pool sizes,
# restarts, progress bars that are off) is not addressed to whoever runs a job.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
