"""Videos and pictures come out as a player shows them, whatever container holds them."""

import io
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from matrix_jax import recipes, video, video_reader, worlds
from matrix_jax.controls import driving
from matrix_jax.data import footage, index, ingest
from matrix_jax.serve.runtime import start_frames
from matrix_jax.video import VideoError

WORLD = worlds.build(recipes.load('carracing').world)


def ffmpeg(*arguments, frames=None):
    command = [imageio_ffmpeg.get_ffmpeg_exe(), '-v', 'error', '-y', *map(str, arguments)]
    subprocess.run(command, input=None if frames is None else frames.tobytes(), check=True)


def write(path, frames, *options):
    """Frames uint8 [F H W 3] at 30 per second, as H.264."""
    height, width = frames.shape[1:3]
    raw = f'-f rawvideo -pix_fmt rgb24 -s {width}x{height} -r 30 -i -'.split()
    ffmpeg(*raw, *options, *'-bf 0 -c:v libx264 -crf 8'.split(), path, frames=frames)


def ramp(count, height=32, width=48):
    """Frames told apart by their grey level: 4, 8, 12, ..."""
    levels = 4 * (1 + np.arange(count, dtype=np.uint8))
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def levels(frames):
    return [round(float(frame.mean()) / 4) - 1 for frame in frames]


@pytest.fixture
def slow_then_fast(tmp_path):
    """20 frames at 10 per second, then 30 frames at 30 per second: 3 s."""
    times = "settb=1/90000,setpts='if(lt(N,20),N/10,2+(N-20)/30)/TB'"
    options = ['-vf', times, '-fps_mode', 'vfr', '-video_track_timescale', '90000']
    write(tmp_path / 'a.mp4', ramp(50), *options, '-pix_fmt', 'yuv420p')
    return tmp_path / 'a.mp4'


def test_a_variable_frame_rate_keeps_its_times(slow_then_fast):
    wanted = [0, 0, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 9]
    found = levels(video.read_video(slow_then_fast, 16))
    assert len(found) == 48 and found[32:34] == [20, 22]
    assert np.abs(np.subtract(found[:16], wanted)).max() <= 1
    times = video.frame_times(slow_then_fast)
    np.testing.assert_allclose(times[[0, 10, 20, 49]], [0, 1, 2, 2 + 29 / 30], atol=1e-3)
    assert levels(video.read_video(slow_then_fast, 16, count=5)) == found[:5]


def test_labels_stay_on_their_frames(slow_then_fast):
    source = ingest.VideoSource('a.mp4', '', ('D',) * 20 + ('DL',) * 30, 5)
    report = ingest.IngestReport()
    reader = index.IndexReader(32, 48, frames=37)
    clip = next(reader.clips(slow_then_fast.parent, source, report))
    late = np.array(levels(clip.frames)) >= 20
    left = clip.controls == driving.SYMBOLS.index('DL')
    assert levels(clip.frames)[0] == 5 and late.any()
    assert (late != left).sum() <= 3 and abs(report.seconds - 3) < 0.1


def test_a_frame_that_stays_for_ever_is_refused(tmp_path):
    times = "settb=1/1000,setpts='if(lt(N,3),N*33,9000000)'"
    write(tmp_path / 'a.mp4', ramp(4), '-vf', times, '-fps_mode', 'vfr', '-pix_fmt', 'yuv420p')
    with pytest.raises(VideoError, match='a.mp4: the frame at .* s stays for .* at most 60'):
        video.read_video(tmp_path / 'a.mp4')
    assert len(video.read_video(tmp_path / 'a.mp4', count=3)) == 3


def test_any_container_is_read_whatever_its_ending(tmp_path):
    write(tmp_path / 'a.mp4', ramp(40), '-pix_fmt', 'yuv420p')
    (tmp_path / 'none').write_bytes((tmp_path / 'a.mp4').read_bytes())
    for name, codec in (
        ('b.ts', 'copy'),
        ('c.flv', 'flv1'),
        ('d.webm', 'libvpx-vp9'),
        ('e.h264', 0),
    ):
        ffmpeg('-i', tmp_path / 'a.mp4', '-c:v', codec or 'copy', tmp_path / name)
    video.write_video(tmp_path / 'f.gif', ramp(40), fps=30)
    (tmp_path / 'notes.bin').write_bytes(b'no video' * 99)
    Image.new('RGB', (8, 8)).save(tmp_path / 'still.dat', 'PNG')
    found = [source.path for source in footage.find(tmp_path)]
    assert found == ['a.mp4', 'b.ts', 'c.flv', 'd.webm', 'e.h264', 'f.gif', 'none']
    for name in found:
        got = levels(video.read_video(tmp_path / name, 15))
        assert np.abs(np.subtract(got, range(0, 40, 2))).max() <= 1, name


def test_pixels_are_square(tmp_path):
    y, x = np.mgrid[:64, :96]
    disc = (((y - 32) ** 2 + (2 * x - 96) ** 2 < 24**2) * 255).astype(np.uint8)
    frames = np.repeat(np.repeat(disc[None, ..., None], 3, -1), 5, 0)
    write(tmp_path / 'a.mp4', frames, '-vf', 'setsar=2/1', '-pix_fmt', 'yuv420p')
    shown = video.read_video(tmp_path / 'a.mp4', 30)
    assert shown.shape == (5, 64, 192, 3)
    lit = shown[0, ..., 0] > 128
    assert abs(int(lit.any(0).sum()) - int(lit.any(1).sum())) <= 2


@pytest.mark.parametrize(
    'option, turned',
    [
        (('-display_rotation', '90'), lambda frame: np.rot90(frame)),
        (('-display_rotation', '180'), lambda frame: frame[::-1, ::-1]),
        (('-display_rotation', '-90'), lambda frame: np.rot90(frame, -1)),
        (('-display_hflip',), lambda frame: frame[:, ::-1]),
        (('-display_vflip',), lambda frame: frame[::-1]),
    ],
)
def test_frames_are_turned_as_the_file_says(tmp_path, option, turned):
    y, x = np.mgrid[:32, :48]
    frames = np.repeat(np.stack([x * 5, y * 7, 200 - x - y], -1).astype(np.uint8)[None], 3, 0)
    write(tmp_path / 'a.mp4', frames, '-pix_fmt', 'yuv420p')
    ffmpeg(*option, '-i', tmp_path / 'a.mp4', '-c', 'copy', tmp_path / 'b.mp4')
    flat = video.read_video(tmp_path / 'a.mp4', 30)[0]
    np.testing.assert_array_equal(video.read_video(tmp_path / 'b.mp4', 30)[0], turned(flat))


def test_a_cover_picture_is_not_the_video(tmp_path):
    write(tmp_path / 'a.mp4', ramp(6), '-pix_fmt', 'yuv420p')
    Image.new('RGB', (64, 64), (255, 0, 0)).save(tmp_path / 'cover.png')
    joined = ['-i', tmp_path / 'cover.png', '-i', tmp_path / 'a.mp4', '-map', 0, '-map', 1]
    ffmpeg(*joined, '-c', 'copy', '-disposition:v:0', 'attached_pic', tmp_path / 'b.mp4')
    assert levels(video.read_video(tmp_path / 'b.mp4', 30)) == list(range(6))


@pytest.mark.parametrize('transfer, white', [('smpte2084', 0.5807), ('arib-std-b67', 0.75)])
def test_high_dynamic_range_is_mapped(tmp_path, transfer, white):
    frames = ramp(4)
    frames[:, :, :16], frames[:, :, 16:32], frames[:, :, 32:] = 0, round(white * 255), 255
    tags = f'setparams=colorspace=bt2020nc:color_primaries=bt2020:color_trc={transfer}'
    change = f'scale=out_color_matrix=bt2020,format=yuv420p10le,{tags}'
    write(tmp_path / 'a.mp4', frames, '-vf', change)
    row = video.read_video(tmp_path / 'a.mp4', 30)[0, 16, ::16]
    black, paper, peak = row[:, 0].astype(int)
    assert black <= 4 and 200 <= paper < 250 <= peak, (black, paper, peak)
    assert np.ptp(row.astype(int), axis=1).max() <= 6  # grey stays grey


# --- pictures --------------------------------------------------------------------------------


def both_doors(path):
    """The picture of `--image`, and that of a player's upload."""
    yield video.read_image(path)
    if path.suffix in ('.png', '.webp', '.jpg'):
        world = WORLD.replace(height=64, width=96)
        yield start_frames.decode_picture(path.read_bytes(), world)


@pytest.mark.parametrize(
    'name, kind, factor',
    [
        ('8.png', np.uint8, 1),
        ('16.png', np.uint16, 257),
        ('32.tiff', np.int32, 257),
        ('byte.tiff', np.int32, 1),
        ('float.tiff', np.float32, 1 / 255),
        ('255.tiff', np.float32, 1),
    ],
)
def test_more_than_8_bits_become_8(tmp_path, name, kind, factor):
    ramp = np.tile(np.linspace(0, 255, 96).round(), (64, 1))
    Image.fromarray((ramp * factor).astype(kind)).save(tmp_path / name)
    for picture in both_doors(tmp_path / name):
        np.testing.assert_array_equal(picture, np.repeat(ramp[..., None], 3, -1))


def test_values_that_are_not_finite_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / 'a.tiff')
    with pytest.raises(VideoError, match='a.tiff: not readable as an image .*not finite'):
        video.read_image(tmp_path / 'a.tiff')


@pytest.mark.parametrize('name', ['a.png', 'a.webp', 'grey.png', 'palette.png'])
def test_transparent_pixels_show_white(tmp_path, name):
    seen = np.zeros((64, 96), np.uint8)
    seen[16:48, 32:64] = 255
    picture = np.dstack([255 - seen, 0 * seen, seen, seen])  # red under the transparent pixels
    image = Image.fromarray(picture)
    if name == 'grey.png':
        image = Image.fromarray(np.dstack([seen // 2, seen]), 'LA')
    if name == 'palette.png':
        image = image.quantize(8)
    image.save(tmp_path / name, lossless=True, exact=True)
    for found in both_doors(tmp_path / name):
        assert found[0, 0].tolist() == [255, 255, 255]
        assert found[32, 48].tolist() == ([127] * 3 if name == 'grey.png' else [0, 0, 255])


def test_pictures_are_turned_by_their_exif_data(tmp_path):
    picture = np.zeros((96, 64, 3), np.uint8)
    picture[:48] = 200
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter, clockwise
    Image.fromarray(picture).save(tmp_path / 'a.png', exif=exif)
    for found in both_doors(tmp_path / 'a.png'):
        assert found.shape == (64, 96, 3)
        assert found[:, :40].max() == 0 and found[:, 60:].min() == 200


@pytest.mark.parametrize('shape', [(1, 60_000), (60_000, 1), (1, 1), (3, 9000)])
@pytest.mark.parametrize('recipe', ['carracing', 'doom'])
def test_extreme_shapes_fit(tmp_path, shape, recipe):
    world = worlds.build(recipes.load(recipe).world)
    Image.new('RGB', shape[::-1], (10, 20, 30)).save(tmp_path / 'a.png')
    fitted = world.fit(video.read_image(tmp_path / 'a.png')[None])
    assert fitted.shape[1:] == (world.cfg.height, world.cfg.width, 3)
    assert (fitted == (10, 20, 30)).all()


def test_bombs_and_devices_are_one_line(tmp_path):
    buffer = io.BytesIO()
    Image.new('1', (40_000, 2000)).save(buffer, 'PNG')
    with pytest.raises(VideoError, match='got 40000x2000 pixels, expected at most 40 million'):
        start_frames.decode_picture(buffer.getvalue(), WORLD)
    for read in (video.read_image, video.read_video):
        with pytest.raises(VideoError, match='/dev/null: is not a file'):
            read('/dev/null')


def test_white_paper_and_peaks_of_tone_mapping():
    grey = np.full((1, 1, 3), 65535, np.uint16)
    for transfer in (video_reader.PQ, video_reader.HLG):
        assert video_reader.tone_mapped(grey, transfer).tolist() == [[[255, 255, 255]]]
        assert video_reader.tone_mapped(0 * grey, transfer).tolist() == [[[0, 0, 0]]]


def test_frames_are_read_at_their_times_from_the_key_frame_before(tmp_path):
    import av

    levels = np.arange(10, 250, 4, dtype=np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (60, 16, 16, 3))
    path = tmp_path / 'a.mp4'
    video.write_video(path, frames, fps=16, min_width=1, key_frames=5)
    with av.open(str(path)) as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert keys[0] and np.diff(np.flatnonzero(keys)).max() <= 5
    wanted = np.array([0, 1, 1, 2, 5, 31, 59])
    for first in (0, 3, 5):
        shown = [frame.mean() for frame in video.read_frames_at(path, wanted[first:] / 16)]
        np.testing.assert_allclose(shown, levels[wanted[first:]], atol=2)
    near = [frame.mean() for frame in video.read_frames_at(path, np.array([20.4, 20.6]) / 16)]
    np.testing.assert_allclose(near, levels[[20, 21]], atol=2)
    with pytest.raises(video.VideoError, match='a.mp4: has no frame at 3.750 s'):
        list(video.read_frames_at(path, np.array([59, 60]) / 16))
    with pytest.raises(video.VideoError, match='gone.mp4: no such file'):
        list(video.read_frames_at(tmp_path / 'gone.mp4', np.array([0.0])))
