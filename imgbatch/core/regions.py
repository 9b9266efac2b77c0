"""In which regions buckets stand: between regions bytes are slow and paid for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from imgbatch.core import s3, storage

_SHOWN = 3


def bucket_region(bucket: str) -> str | None:
    """The region of ``s3://`` and a bucket; none where the server does not say, or does not answer."""
    fs, name = storage.filesystem(bucket)
    try:
        return s3.bucket_region(fs, name)
    except Exception:  # clients' exceptions differ
        return None


def region_warnings(uris: Iterable[str | None], here: Sequence[str]) -> list[str]:
    """A line for each other region that buckets of ``uris`` stand in.

    Args:
        here: the regions of the cluster's nodes, or the one that is configured; none: unknown, no warning.
    """
    if not here:
        return []
    # As s3a:// too: what counts is the bucket.
    buckets = sorted({"/".join(storage.absolute(uri).split("/")[:3]) for uri in uris if uri and storage.is_s3(uri)})
    elsewhere: dict[str, list[str]] = {}
    for bucket in buckets:
        region = bucket_region(bucket)
        if region is not None and region not in here:
            elsewhere.setdefault(region, []).append(bucket)
    return [
        f"{', '.join(found[:_SHOWN])}{' and more' if len(found) > _SHOWN else ''} in region {region}, and the work in "
        f"{', '.join(here)}: what crosses between regions is slow and paid for by the GB"
        for region, found in elsewhere.items()
    ]
