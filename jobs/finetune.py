"""Fine-tuning for a plain ``ray job submit --working-dir . -- python jobs/finetune.py ...``.

Takes the options of ``imgbatch train``.
"""

from __future__ import annotations

import sys

from imgbatch.cli import run

if __name__ == "__main__":
    sys.exit(run(["train", *sys.argv[1:]]))
