"""Evaluation of stored predictions for a plain ``ray job submit --working-dir . -- python jobs/evaluate.py ...``.

Takes the options of ``imgbatch evaluate``.
"""

from __future__ import annotations

import sys

from imgbatch.cli import run

if __name__ == "__main__":
    sys.exit(run(["evaluate", *sys.argv[1:]]))
