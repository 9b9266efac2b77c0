"""Fine-tuning as a job for a cluster: ``ray job submit --working-dir . -- python -m jobs.finetune -c recipe.yaml ...``.

Takes the options of ``imgbatch train``.
"""

from __future__ import annotations

import sys

from imgbatch.cli import run

if __name__ == "__main__":
    sys.exit(run(["train", *sys.argv[1:]]))
