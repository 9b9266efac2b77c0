"""The tiny labelled collection that training is tested on, for the engines too, and a question to a job's output."""

from imgbatch.config import Config
from imgbatch.core.views import open_views
from tests.core.training.conftest import _one_thread, colour_config, colour_images, colour_manifest, write_manifest

__all__ = ["_one_thread", "colour_config", "colour_images", "colour_manifest", "rows_of", "write_manifest"]


def rows_of(config: Config, sql: str) -> list[tuple[object, ...]]:
    with open_views(str(config.output.path)) as connection:
        return connection.execute(sql).fetchall()
