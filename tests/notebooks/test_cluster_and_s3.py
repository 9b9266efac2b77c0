from __future__ import annotations

import re
import tempfile

import pytest

from tests.notebooks.conftest import printed


@pytest.mark.soak
def test_the_second_night_labels_only_what_is_new(s3_bucket, tiny_model, tmp_path, run_notebook):
    """On a Ray of the kernel's own, which is why it belongs to the soak."""
    notebook = run_notebook(
        "04_cluster_and_s3",
        IMGBATCH_S3=s3_bucket,
        IMGBATCH_MODEL=tiny_model.path,
        IMGBATCH_NOTEBOOK_IMAGES="60",
        RAY_AUTH_MODE="disabled",
        TMPDIR=str(tmp_path),
        RAY_TMPDIR=tempfile.gettempdir(),  # the path of a socket has room for about a hundred characters
    )
    said = printed(notebook, stream="stdout")
    first, second = (int(count) for count in re.findall(r"'OK': (\d+)", said))
    assert (first, second) == (60, 12)
    assert "verified: True" in said
    assert "72 images, 72 current rows" in said
    assert "72 rows in 1 file(s)" in said
