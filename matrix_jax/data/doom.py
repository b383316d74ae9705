"""Recordings of ViZDoom: W S A D and mouse in, 16 frames per second and exact poses out.

The maps (`doom_maps`) come with the package or are written by `gallery`. They are empty, nothing is
drawn over the picture, and the walker cannot be hurt. Doors stay shut, as no key opens them;
galleries have open doorways. An episode starts at a random place and ends early after a teleporter.

A frame is always two tics, so at 16 fps the game runs at 32 tics per second, 9 % slower than its
own 35. With 35 tics, every fifth or sixth frame would last half as long again, and steps under a
held key would be uneven.

The game draws [480 640] with a 90 degree view. The middle [384 640] is averaged 4 x 4 to [96 160],
with a focal length of 80 pixels, and brightened, as Freedoom is dark.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np

from matrix_jax.data import gallery
from matrix_jax.data.doom_maps import GALLERY, DoomMap, place
from matrix_jax.data.doom_maps import THEMES as THEMES
from matrix_jax.data.explorer import Explorer, Sight
from matrix_jax.data.records import FRAMES_PER_LATENT, MOUSE_RATE, Clip, unknown, wrap
from matrix_jax.data.visitor import Visitor

HEIGHT, WIDTH, FPS = 96, 160, 16
NEEDS = ('vizdoom',)
TICS = 2  # per frame
MOUSE_DEGREES = MOUSE_RATE / FPS / TICS  # per tic, for a mouse component of 1
SUPERSAMPLE, ROWS = 4, slice(48, 432)
FOCAL = 320.0  # focal length in pixels of the drawn picture
GAMMA = 1.5
DEPTH = 7.2  # map units per step of the depth buffer
JUMP = 48.0  # map units per frame above which the walker was teleported
ROOM = 96.0  # free map units ahead at the start of an episode
STILL = [0] * 6
MOVES = ('MOVE_FORWARD', 'MOVE_BACKWARD', 'MOVE_LEFT', 'MOVE_RIGHT')
BUTTONS = (*MOVES, 'LOOK_UP_DOWN_DELTA', 'TURN_LEFT_RIGHT_DELTA')
VARIABLES = ('POSITION_X', 'POSITION_Y', 'CAMERA_POSITION_Z', 'ANGLE', 'PITCH')
LAYERS = ('hud', 'weapon', 'crosshair', 'messages')  # drawn over the picture
LAYERS += ('decals', 'particles', 'effects_sprites', 'corpses', 'screen_flashes')
ABOUT = {'tics': TICS, 'mouse_rate': MOUSE_RATE, 'gamma': GAMMA}


class VizDoomGame:
    """A walker in one map, headless: `reset` to a place, then `hold` keys and mouse."""

    def __init__(self):
        import vizdoom

        self.vizdoom, self.game, self.open = vizdoom, None, None
        self.folder = tempfile.TemporaryDirectory(prefix='doom-')

    def close(self):
        if self.game is not None:
            self.game.close()
            self.game = None
        self.folder.cleanup()

    def reset(self, level: DoomMap, seed: int, rng: np.random.Generator) -> bool:
        """Puts the walker at a random place in `level`, facing free space -> whether it worked."""
        self._new_episode(level, seed)
        for _ in range(40):
            if not self._warp(*self._anywhere(rng)):
                continue
            ahead = []
            for _ in range(8):
                self._act([0, 0, 0, 0, 0, 45.0], 1)
                ahead.append(np.median(self.sight().ahead[6:-6]))
            good = np.flatnonzero(np.array(ahead) > ROOM)
            if len(good):
                turn = 45.0 * (1 + rng.choice(good)) + rng.uniform(-20, 20)
                self._act([0, 0, 0, 0, 0, float(turn)], 1)
                return not self.over
        return False

    def begin_at(self, level: DoomMap, seed: int, pose) -> bool:
        """Puts the walker at a recorded pose, at rest -> whether it stands there.

        Args:
          level: map of the recording.
          seed: seed of the recording.
          pose: as in `records.POSE`.
        """
        self._new_episode(level, seed)
        if not self._warp(*map(float, pose[:2])):
            return False
        for _ in range(16):  # the first tics after a warp ignore the mouse
            yaw, pitch = np.degrees(wrap(np.asarray(pose[3:5]) - self.pose()[3:5]))
            if max(abs(yaw), abs(pitch)) < 0.1:
                return True
            self._act([0, 0, 0, 0, float(pitch), -float(yaw)], 1)
            if self.over:
                break
        return False

    def _new_episode(self, level: DoomMap, seed: int):
        if self.open != level:
            self._start(level)
        self.game.set_seed(seed % 2**31)
        self.game.new_episode()
        self.game.send_game_command('god')

    def _warp(self, x: float, y: float) -> bool:
        """Moves the walker -> whether it is there."""
        # The engine ignores input in the first frames of an episode.
        self._act(STILL, 4)
        self.game.send_game_command(f'warp {x:.1f} {y:.1f}')
        self._act(STILL, 2)
        return not self.over and np.hypot(*(self.pose()[:2] - (x, y))) <= 1

    def _start(self, level: DoomMap):
        vizdoom, root = self.vizdoom, os.path.dirname(self.vizdoom.__file__)
        if self.game is not None:
            self.game.close()
        game = self.game = vizdoom.DoomGame()
        freedoom = level.wad.startswith('freedoom')
        game.set_doom_game_path(f'{root}/{level.wad if freedoom else "freedoom2"}.wad')
        if level.wad == GALLERY:
            path = Path(self.folder.name) / 'gallery.wad'
            path.write_bytes(gallery.wad(level.seed, GAMMA))
            game.set_doom_scenario_path(str(path))
        elif not freedoom:
            game.set_doom_scenario_path(f'{root}/scenarios/{level.wad}.wad')
        game.set_doom_map(level.name)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_640X480)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        for layer in LAYERS:
            getattr(game, f'set_render_{layer}')(False)
        game.set_depth_buffer_enabled(True)
        game.set_sectors_info_enabled(True)
        game.set_available_buttons([getattr(vizdoom.Button, name) for name in BUTTONS])
        game.set_available_game_variables(
            [getattr(vizdoom.GameVariable, name) for name in VARIABLES]
        )
        game.set_doom_skill(1)
        game.set_episode_timeout(0)
        game.add_game_args(
            '-nomonsters +movebob 0 +stillbob 0 +cl_showsecretmessage 0 +r_visibility 24'
        )
        with contextlib.chdir(self.folder.name):  # the engine writes its settings to the cwd
            game.init()
        self.open = level
        self.sectors = [
            (np.array([(line.x1, line.y1, line.x2, line.y2) for line in sector.lines]))
            for sector in game.get_state().sectors
            if len(sector.lines) > 2 and sector.ceiling_height - sector.floor_height >= 72
        ]
        ends = np.concatenate(self.sectors)
        self.bounds = ends[:, :2].min(axis=0), ends[:, :2].max(axis=0)
        game.set_sectors_info_enabled(False)

    def _anywhere(self, rng) -> np.ndarray:
        """Random point on a floor, not too close to a wall."""
        while True:
            point = rng.uniform(*self.bounds)
            for lines in self.sectors:
                if _inside(point, lines) and _distance(point, lines) > 24:
                    return np.round(point)

    def _act(self, action, tics: int):
        self.game.make_action(action, tics)
        self.state = self.game.get_state()

    @property
    def over(self) -> bool:
        """Whether the episode has ended at an exit."""
        return self.state is None

    def hold(self, keys, mouse, frames: int = FRAMES_PER_LATENT, draw: bool = True):
        """Holds keys and mouse -> (frames uint8 [F H W 3], poses float32 [F 6]).

        There are fewer frames than requested if the episode ends.

        Args:
          keys: W S A D, each 0 or 1.
          mouse: (pitch, yaw), up and right positive, in units of `records.MOUSE_RATE`.
          frames: number of frames.
          draw: whether to return frames.
        """
        action = [*map(int, keys), *(float(one) * MOUSE_DEGREES for one in mouse)]
        pictures, poses = [], []
        for _ in range(frames):
            self._act(action, TICS)
            if self.over:
                break
            poses.append(self.pose())
            if draw:
                pictures.append(self.frame())
        return np.array(pictures, np.uint8), np.array(poses, np.float32).reshape(-1, 6)

    def pose(self) -> np.ndarray:
        """Current pose of the camera, in the order of `records.POSE`."""
        x, y, z, yaw, pitch = self.state.game_variables
        return np.array([x, y, z, wrap(np.radians(yaw)), -wrap(np.radians(pitch)), 0.0])

    def frame(self) -> np.ndarray:
        """Current picture uint8 [H W 3]."""
        from PIL import Image

        picture = Image.fromarray(self.state.screen_buffer[ROWS])
        return BRIGHT[np.asarray(picture.reduce(SUPERSAMPLE))]

    def sight(self) -> Sight:
        """Distances to the walls from left to right, from the depth buffer."""
        depth = self.state.depth_buffer
        horizon = depth.shape[0] / 2 + FOCAL * np.tan(self.pose()[4])
        row = int(np.clip(horizon, 0, depth.shape[0] - 51))
        columns = np.arange(8, depth.shape[1], 16)
        ahead = depth[row : row + 20 : 4, columns].min(axis=0) * DEPTH
        # Low obstacles do not reach these rows; close ones are too high to climb.
        low = depth[row + 50, columns] * DEPTH
        ahead = np.where(low < 90, np.minimum(ahead, low), ahead)
        bearing = np.arctan((depth.shape[1] / 2 - columns) / FOCAL)
        return Sight(ahead.astype(np.float64), bearing)


BRIGHT = np.round(255 * (np.arange(256) / 255) ** (1 / GAMMA)).astype(np.uint8)


def _inside(point, lines) -> bool:
    """Whether a point is inside the polygon of lines [N 4], by counting ray crossings."""
    (x, y), (x1, y1, x2, y2) = point, lines.T
    across = (y1 > y) != (y2 > y)
    at = x1[across] + (y - y1[across]) / (y2 - y1)[across] * (x2 - x1)[across]
    return bool(np.count_nonzero(at > x) % 2)


def _distance(point, lines) -> float:
    """Distance of a point from the nearest of lines [N 4]."""
    start, along = lines[:, :2], lines[:, 2:] - lines[:, :2]
    share = ((point - start) * along).sum(axis=1) / np.maximum((along**2).sum(axis=1), 1e-9)
    nearest = start + np.clip(share, 0, 1)[:, None] * along
    return float(np.hypot(*(point - nearest).T).min())


def record(game: VizDoomGame, seed: int, theme: str, frames: int, rng: np.random.Generator) -> Clip:
    """Records an episode of up to `frames` = 1 + 4k frames in the map of `place`.

    It ends early if something other than keys moves the walker.
    """
    level = place(theme, seed)
    explorer = _explorer(level, rng)
    while not (game.reset(level, seed, rng) and _warmed(game, explorer, rng)):
        explorer = _explorer(level, rng)
    pictures, poses = [game.frame()[None]], [game.pose()[None]]
    actions = [explorer.pressed()]
    for _ in range((frames - 1) // FRAMES_PER_LATENT):
        keys, mouse = explorer.choose(game.sight())
        picture, pose = game.hold(keys, mouse)
        steps = np.diff(np.concatenate([poses[-1][-1:], pose])[:, :2], axis=0)
        if len(pose) < FRAMES_PER_LATENT or np.hypot(*steps.T).max() > JUMP:
            break
        explorer.moved(pose)
        pictures.append(picture)
        poses.append(pose)
        actions.append((keys, mouse))
    held = np.concatenate([[0], np.repeat(np.arange(1, len(actions)), FRAMES_PER_LATENT)])
    return Clip(
        frames=np.concatenate(pictures),
        **unknown(len(held))
        | {
            'keyboard': np.array([keys for keys, _ in actions], np.int8)[held],
            'mouse': np.array([mouse for _, mouse in actions], np.float32)[held],
            'pose': np.concatenate(poses).astype(np.float32),
        },
        caption=level.captions[int(rng.integers(len(level.captions)))],
        theme=theme,
        seed=seed,
        fps=FPS,
    )


def _explorer(level: DoomMap, rng) -> Explorer:
    """Agent that records a map."""
    return Visitor(rng, gallery.layout(level.seed)) if level.wad == GALLERY else Explorer(rng)


def _warmed(game: VizDoomGame, explorer: Explorer, rng) -> bool:
    """Plays some latent frames unseen, so that most episodes start in motion."""
    explorer.start()
    for _ in range(2 + int(rng.integers(4))):
        _, poses = game.hold(*explorer.pressed(), draw=False)
        if game.over:
            return False
        explorer.moved(poses)
    return True


new_game = VizDoomGame  # what `collect` opens
