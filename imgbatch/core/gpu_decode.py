"""JPEG decoding where the model runs, by nvJPEG, for machines whose cores cannot feed their GPU.

Decode actors leave a share of the rows of each unit to it (``decode.gpu_share``): plain JPEGs only, see
:func:`imgbatch.core.jpeg_header.read_plain_header`. Which rows is a matter of their row_id, not of who is idle: the
two ways do not give the same pixels, and the same job must give the same results.

libjpeg interpolates chroma that was stored at half of the size (4:2:0, as cameras and the web have it), and nvJPEG
repeats it, as TorchCodec sets it up: at the edges of colours pixels differ by more than rounding does, the less the
more an image is made smaller. Grey images, and those with whole chroma (4:4:4), differ by 1 of 255 here and there.

The resize follows the CPU's, and so Pillow's: across, then down, rounding to integers after each. On a CPU everything
here runs too, with libjpeg in nvJPEG's place; that is how it is tested.

Shape suffixes: N image, H height, W width, C channel.
"""

from __future__ import annotations

import functools
import io
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imgbatch.config import DecodeConfig
from imgbatch.core.decoder import DecodedUnit, Decoder
from imgbatch.core.transforms import PreprocessSpec
from imgbatch.errors import UsageError, normalise_message

_MAX_IMAGES, _MAX_BYTES = 128, 512 * 2**20
"""Of one call: what is decoded, full size, and not yet cropped."""
_MAX_REFUSED = 8
"""Images of one call; each is found in about a dozen calls of the device, and the CPU decodes the others sooner."""


class GpuDecoder:
    """Encoded plain JPEGs to crops on ``device``. Holds a child process once an image needed one.

    What the device cannot decode is decoded like any other image, in a child process that can be killed, and fails
    there if it is damaged. Several threads may call it.

    Raises:
        UsageError: the device decodes nothing, as where TorchCodec or nvJPEG is not for its driver.
    """

    def __init__(self, spec: PreprocessSpec, config: DecodeConfig, *, device: str) -> None:
        from torchcodec.decoders import decode_jpeg

        self._decode_jpeg = decode_jpeg
        self._spec = spec
        self._device = device
        self._decoder = Decoder(spec, config)
        # nvJPEG's engine does not wait for what is queued on its stream, in memory that it may be given next.
        self._using_device, self._using_decoder = threading.Lock(), threading.Lock()
        self._try_out()

    def _try_out(self) -> None:
        """Later, a device that decodes nothing would leave all of its share to one core."""
        try:
            self._decode_probe()
        except Exception as error:
            raise UsageError(
                f"decode.gpu_share: {self._device} decodes no JPEG here ({normalise_message(error)}); install a "
                f"torchcodec that fits torch and the driver, or set it to 0"
            ) from error

    def decode(self, images: Sequence[bytes], sizes: Sequence[tuple[int, int]]) -> DecodedUnit:
        """The crops of ``images``.

        Args:
            sizes: width and height of each, px, from its header.

        Raises:
            torch.AcceleratorError: the GPU is in a state that only a new process cures.
        """
        side = self._spec.crop_size
        pixels_NHWC = np.zeros((len(images), side, side, 3), np.uint8)
        failed: list[int] = []
        for start, stop in _calls(sizes):
            failed += self._decode_call(images, range(start, stop), pixels_NHWC)
        widths, heights = (np.array([size[axis] for size in sizes], np.int32) for axis in (0, 1))
        result = DecodedUnit(pixels_NHWC, widths, heights, [None] * len(images), decode_s=0.0)
        if failed:
            with self._using_decoder:
                again = self._decoder.decode([images[index] for index in failed], len(failed))
            for place, index in enumerate(failed):
                pixels_NHWC[index] = again.pixels_NHWC[place]
                widths[index], heights[index] = again.widths[place], again.heights[place]
                result.errors[index] = again.errors[place]
        return result

    def close(self) -> None:
        """End the child."""
        self._decoder.close()

    def _decode_call(self, images: Sequence[bytes], indices: range, pixels_NHWC: np.ndarray) -> list[int]:
        """Crops of one call, into ``pixels_NHWC``; gives the indices that came to nothing."""
        failed: list[int] = []
        num_refused, parts = 0, [indices]
        while parts and num_refused < _MAX_REFUSED:
            part = parts.pop()
            if self._decoded(images, part, pixels_NHWC):
                continue
            if self._device != "cpu":
                # nvJPEG has its memory from the driver, and torch keeps what it has once had.
                torch.cuda.empty_cache()
            if len(part) == 1:
                num_refused += 1
                failed += part
            elif self._works():
                # One bad image fails the call, and is found by halves.
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
            else:
                parts.append(part)
                break
        return failed + [index for part in reversed(parts) for index in part]

    def _works(self) -> bool:
        """Whether the device decodes at all, so that a failure is about the images or their number."""
        try:
            with self._using_device:
                self._decode_probe()
        except torch.AcceleratorError:
            raise
        except RuntimeError:
            return False
        return True

    def _decode_probe(self) -> None:
        """Two photographs: small ones, or one alone, nvJPEG may decode in other ways than most of a unit."""
        self._decode_jpeg([_photograph()] * 2, mode="RGB", device=self._device)

    def _decoded(self, images: Sequence[bytes], indices: Sequence[int], pixels_NHWC: np.ndarray) -> bool:
        """Whether the device made crops of them."""
        try:
            with self._using_device:
                decoded = self._decode_jpeg([images[index] for index in indices], mode="RGB", device=self._device)
                crops = torch.stack([crop(pixels_CHW, self._spec) for pixels_CHW in decoded])
                pixels_NHWC[indices[0] : indices[-1] + 1] = crops.cpu().numpy()
        except torch.AcceleratorError:
            raise
        except RuntimeError:
            return False
        return True


@functools.cache
def _photograph() -> bytes:
    """Baseline, 640 x 480 px, chroma at half of the size: as most files from cameras and the web are."""
    ramp, encoded = Image.linear_gradient("L").resize((640, 480)), io.BytesIO()
    image = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.ROTATE_180), ramp))
    image.save(encoded, "JPEG", subsampling="4:2:0")
    return encoded.getvalue()


def crop(pixels_CHW: Tensor, spec: PreprocessSpec) -> Tensor:
    """The model's crop, uint8 [side, side, C], of an upright image, uint8 [C, H, W], on the same device."""
    _, height, width = pixels_CHW.shape
    geometry, side = spec.geometry(width, height), spec.crop_size
    across = _resize(pixels_CHW, (height, geometry.resized_width), spec)[:, :, geometry.left : geometry.left + side]
    down = _resize(across, (geometry.resized_height, side), spec)[:, geometry.top : geometry.top + side]
    return down.permute(1, 2, 0).to(torch.uint8)


def _resize(pixels_CHW: Tensor, size: tuple[int, int], spec: PreprocessSpec) -> Tensor:
    """float32, whole numbers from 0 to 255."""
    resized = torch.nn.functional.interpolate(
        pixels_CHW[None].float(), size, mode=spec.interpolation, antialias=True, align_corners=False
    )
    return resized[0].round().clamp(0, 255)


def _calls(sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Runs of images, ``start`` to ``stop``, that are decoded together."""
    start, num_bytes = 0, 0
    for index, (width, height) in enumerate(sizes):
        if index > start and (index - start == _MAX_IMAGES or num_bytes + 3 * width * height > _MAX_BYTES):
            yield start, index
            start, num_bytes = index, 0
        num_bytes += 3 * width * height
    if start < len(sizes):
        yield start, len(sizes)
