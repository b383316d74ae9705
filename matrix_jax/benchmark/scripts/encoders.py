"""Compares image and video encoders for the live player on frames of the bundled world.

    python -m matrix_jax.benchmark.scripts.encoders

Prints CPU milliseconds per frame, bytes per frame and PSNR. Frames are the start clips of the
bundled world, five scenes of 29 frames, at their own size and enlarged. H.264 runs in one process
per stream (one thread, no delay); its start-up time is subtracted.
"""

import io
import resource
import subprocess
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
    import imageio_ffmpeg

    program, (_, height, width, _) = imageio_ffmpeg.get_ffmpeg_exe(), frames.shape
    raw = ['-f', 'rawvideo', '-pix_fmt', 'rgb24', '-s', f'{width}x{height}', '-r', '16']
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'stream.h264'
        quiet = [program, '-y', '-loglevel', 'error']
        encode = [
            *quiet,
            *raw,
            '-i',
            '-',
            '-c:v',
            'libx264',
            '-threads',
            '1',
            '-preset',
            preset,
            '-tune',
            'zerolatency',
            '-crf',
            str(crf),
            '-pix_fmt',
            'yuv420p',
            str(path),
        ]

        def spent(given):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(encode, input=given.tobytes(), check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        start = min(spent(frames[:1]) for _ in range(3))
        took, size = min(spent(frames) for _ in range(3)) - start, path.stat().st_size
        shown = subprocess.run(
            [*quiet, '-i', str(path), *raw[:4], '-'], check=True, stdout=subprocess.PIPE
        ).stdout
    return (
        took / (len(frames) - 1),
        size / len(frames),
        np.frombuffer(shown, np.uint8).reshape(frames.shape),
    )


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
