"""Classes drawn on a map, as polygons or points of a GeoJSON file, as the targets of tiles. Needs the extra ``geo``."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

import pyarrow as pa
import shapely

from imgbatch.core import storage
from imgbatch.errors import UsageError


class VectorLabels:
    """Labelled features in longitude and latitude, as GeoJSON (RFC 7946) always is.

    Args:
        path: a GeoJSON FeatureCollection.
        field: the property that names the class; features without it are left out.

    Raises:
        UsageError: not such a file, or no feature has the property.
    """

    def __init__(self, path: str, field: str) -> None:
        try:
            features = json.loads(storage.read_bytes(path))["features"]
            labelled = [feature for feature in features if (feature.get("properties") or {}).get(field) is not None]
            geometries = [shapely.from_geojson(json.dumps(feature["geometry"])) for feature in labelled]
        except OSError as error:
            raise UsageError(f"--labels {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError, AttributeError, shapely.GEOSException) as error:
            raise UsageError(f"--labels {path}: not a GeoJSON FeatureCollection ({error})") from error
        if not labelled:
            raise UsageError(f"--labels {path}: no feature has the property {field!r}; name it with --label-field")
        self._classes = [str(feature["properties"][field]) for feature in labelled]
        self._geometries = geometries
        self._tree = shapely.STRtree(geometries)

    def targets(self, tiles: pa.Array) -> list[str | None]:
        """The class of each tile (WKB polygons): that which covers most of it, else that of most points in it.

        None where nothing touches a tile or it has no geometry; of equals the first by name.
        """
        return [self._target(shapely.from_wkb(tile)) if tile is not None else None for tile in tiles.to_pylist()]

    def _target(self, tile: Any) -> str | None:
        weights: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
        for index in self._tree.query(tile, predicate="intersects"):
            area, points = weights[self._classes[index]]
            common = self._geometries[index].intersection(tile)
            weights[self._classes[index]] = (area + common.area, points + len(shapely.get_parts(common)))
        return min(weights, key=lambda name: (-weights[name][0], -weights[name][1], name)) if weights else None
