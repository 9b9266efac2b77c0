"""The engines. The only package that imports ray; ``local`` and ``job`` do without until they need it."""

import os

# Ray's processes and Ray Data read these once, as they are loaded: what they report by themselves (pool sizes,
# restarts, progress bars that are off) is not addressed to whoever runs a job.
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
# What becomes of actors, Ray prints by itself even with log_to_driver off; the job tells it in a line of its own. And
# the results of Ray Data's own bookkeeping are asked for by nobody: that they are errors is a traceback each.
os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
