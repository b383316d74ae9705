"""Compares image and video encoders for the live player on frames of the bundled world.

    python -m matrix_jax.benchmark.scripts.encoders

Prints CPU milliseconds per frame, bytes per frame and PSNR. Frames are the start clips of the
bundled world, five scenes of 29 frames, at their own size and enlarged. H.264 is one stream of all
frames (one thread, no delay); the time for one frame is subtracted.
"""

import io
import tempfile
import time
from pathlib import Path

import numpy as np

from matrix_jax import video

CLIPS = Path(video.__file__).parent / 'assets' / 'carracing' / 'starts'
SIZE, LARGE = (64, 96), (480, 720)
PILLOW = (
    ('JPEG 85', {'format': 'JPEG', 'quality': 85, 'subsampling': 0}),
    ('JPEG 90', {'format': 'JPEG', 'quality': 90, 'subsampling': 0}),
    ('JPEG 98', {'format': 'JPEG', 'quality': 98, 'subsampling': 0}),
    ('WebP 90, fastest', {'format': 'WEBP', 'quality': 90, 'method': 0}),
    ('WebP 90', {'format': 'WEBP', 'quality': 90}),
    ('WebP lossless, fastest', {'format': 'WEBP', 'lossless': True, 'quality': 0, 'method': 0}),
    ('PNG, fastest', {'format': 'PNG', 'compress_level': 1}),
    ('PNG', {'format': 'PNG'}),
)
H264 = (('H.264 23, ultrafast', 'ultrafast', 23), ('H.264 16, veryfast', 'veryfast', 16))


def pillow(frames: np.ndarray, options: dict):
    """Encodes single pictures -> (CPU seconds per frame, bytes per frame, decoded frames)."""
    from PIL import Image

    files, began = [io.BytesIO() for _ in frames], time.process_time()
    for frame, file in zip(frames, files):
        Image.fromarray(frame).save(file, **options)
    took = time.process_time() - began
    shown = np.stack([np.asarray(Image.open(file).convert('RGB')) for file in files])
    return took / len(frames), sum(file.tell() for file in files) / len(frames), shown


def h264(frames: np.ndarray, preset: str, crf: int):
    """Encodes a video stream; returns what `pillow` does."""
    options = {'preset': preset, 'tune': 'zerolatency', 'crf': str(crf), 'threads': '1'}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'stream.mp4'

        def spent(given):
            began, encoder = time.process_time(), video.Mp4Encoder(path, 16, options, {})
            for frame in given:
                encoder.add(frame)
            encoder.close()
            return time.process_time() - began

        start = min(spent(frames[:1]) for _ in range(3))
        took, size = min(spent(frames) for _ in range(3)) - start, path.stat().st_size
        return took / (len(frames) - 1), size / len(frames), video.read_video(path)


def psnr(frames: np.ndarray, shown: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal frames."""
    error = np.mean((frames.astype(np.float32) - shown) ** 2, dtype=np.float64)
    return 10 * np.log10(255**2 / error) if error else np.inf


def main():
    clips = [video.read_image(path).reshape(-1, *SIZE, 3) for path in sorted(CLIPS.glob('*.png'))]
    frames = np.concatenate(clips)
    for shown in (frames, video.resize(frames, *LARGE)):
        print(f'\n{len(shown)} frames of {shown.shape[1]}x{shown.shape[2]}\n')
        print('| encoder | ms per frame | bytes per frame | PSNR, dB |\n| --- | --- | --- | --- |')
        for name, encode, *given in (
            *((name, pillow, options) for name, options in PILLOW),
            *((name, h264, *more) for name, *more in H264),
        ):
            encode(shown[:2], *given)  # warm-up
            took, size, after = encode(shown, *given)
            print(
                f'| {name} | {1e3 * took:.2f} | {size:,.0f} | {psnr(shown, after):.1f} |',
                flush=True,
            )


if __name__ == '__main__':
    main()
