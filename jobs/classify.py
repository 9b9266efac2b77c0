"""Classification for a plain ``ray job submit --working-dir . -- python jobs/classify.py ...``.

Takes the options of ``imgbatch classify``.
"""

from __future__ import annotations

import sys

from imgbatch.cli import run

if __name__ == "__main__":
    sys.exit(run(["classify", *sys.argv[1:]]))
