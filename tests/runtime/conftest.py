"""The tiny labelled collection that training is tested on, for the engines too."""

from tests.core.training.conftest import _one_thread, colour_config, colour_images, colour_manifest, write_manifest

__all__ = ["_one_thread", "colour_config", "colour_images", "colour_manifest", "write_manifest"]
