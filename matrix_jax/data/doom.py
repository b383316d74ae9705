"""ViZDoom as a recorder: W S A D and a mouse in, 16 frames a second and exact poses out.

The maps are those that the package brings: its own scenarios and Freedoom. Nobody else is in them,
nothing is drawn over the picture, and the walker cannot be hurt. Doors stay shut, since there is no
key for them: an episode starts at a random place of its map and ends early behind a teleporter.

A frame is two tics of the game, always: at 16 frames a second its clock runs at 32 tics, 9 % slower
than its 35. With its own clock every fifth or sixth frame would be half as long again as the
others, and steps under a held key would not be even.

The game draws at [480 640] with 90 degrees across; the middle [384 640] is averaged 4 x 4 to
[96 160], where a focal length is 80 pixels, and brightened, for Freedoom is dark.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from typing import NamedTuple

import numpy as np

from matrix_jax.data.explorer import Explorer, Sight
from matrix_jax.data.records import FRAMES_PER_LATENT, MOUSE_RATE, Clip, unknown, wrap

HEIGHT, WIDTH, FPS = 96, 160, 16
NEEDS = ('vizdoom',)
TICS = 2  # of the game in a frame
MOUSE_DEGREES = MOUSE_RATE / FPS / TICS  # of a tic and a mouse component of 1
SUPERSAMPLE, ROWS = 4, slice(48, 432)
FOCAL = 320.0  # pixels of the drawn picture
GAMMA = 1.5
DEPTH = 7.2  # map units of a step of the depth buffer
JUMP = 48.0  # map units in a frame that no walker makes: a teleporter
ROOM = 96.0  # map units that a place to start at has ahead
STILL = [0] * 6
ABOUT = {'tics': TICS, 'mouse_rate': MOUSE_RATE, 'gamma': GAMMA}


class DoomMap(NamedTuple):
    wad: str  # of the package: a scenario, freedoom1 or freedoom2
    name: str
    captions: tuple[str, ...]


class MapTheme(NamedTuple):
    maps: tuple[DoomMap, ...]
    held_out: tuple[DoomMap, ...]


THEMES = {
    'maze': MapTheme(
        (
            DoomMap(
                'my_way_home',
                'map01',
                (
                    'Walking through brown brick corridors between small bright rooms, first person.',
                    'A maze of brown bricks with coloured rooms, seen by someone who walks in it.',
                ),
            ),
            DoomMap(
                'health_gathering_supreme',
                'map01',
                (
                    'Walking through a maze of grey stone on a green floor, first person.',
                    'Grey stone walls, a green floor and a dark sky, seen by a walker.',
                ),
            ),
            DoomMap(
                'deathmatch',
                'map01',
                (
                    'Walking through a wide court of brown and pink bricks, first person.',
                    'Brick walls on a sandy floor under a dark blue sky, seen by a walker.',
                ),
            ),
        ),
        (
            DoomMap(
                'multi_deathmatch',
                'map01',
                (
                    'Walking through grey stone halls with lamps on the ceiling, first person.',
                    'Grey brick halls with crates and black screens, seen by a walker.',
                ),
            ),
        ),
    ),
    # One place of few textures, for networks that have seen little.
    'garden': MapTheme(
        (
            DoomMap(
                'health_gathering_supreme',
                'map01',
                (
                    'Walking through a garden maze of grey stone walls on grass, first person.',
                    'Grey stone walls on green grass under a dark blue sky, seen by a walker.',
                ),
            ),
        ),
        (
            DoomMap(
                'health_gathering',
                'map01',
                (
                    'Walking over a lawn with low walls of mossy stone, first person.',
                    'Mossy stone walls around a lawn under a dark blue sky, seen by a walker.',
                ),
            ),
        ),
    ),
    # One room of few textures, for networks that have seen little.
    'hall': MapTheme(
        (
            DoomMap(
                'take_cover',
                'map01',
                (
                    'Walking through an empty hall of pale bricks under a grey ceiling, first person.',
                    'Pale brick walls between a grey floor and a grey ceiling, seen by a walker.',
                ),
            ),
        ),
        (
            DoomMap(
                'defend_the_line',
                'map01',
                (
                    'Walking through a wide empty hall of pale bricks, first person.',
                    'Brick walls of a wide grey hall, seen by someone who walks there.',
                ),
            ),
        ),
    ),
    'base': MapTheme(
        (
            DoomMap(
                'freedoom2',
                'MAP01',
                (
                    'Walking through a base of brown stone and grey machines, first person.',
                    'Brown halls with lamps and a dark garden outside, seen by a walker.',
                ),
            ),
            DoomMap(
                'freedoom2',
                'MAP04',
                (
                    'Walking through a pale concrete base with green panels, first person.',
                    'White and grey halls of a base, seen by someone who walks there.',
                ),
            ),
            DoomMap(
                'freedoom2',
                'MAP07',
                (
                    'Walking through grey stone halls with green slime behind windows, first person.',
                    'Grey halls and stairs of stone blocks, seen by a walker.',
                ),
            ),
            DoomMap(
                'freedoom1',
                'E1M2',
                (
                    'Walking through a steel base with railings and signs, first person.',
                    'Grey steel rooms with green doors and bright lamps, seen by a walker.',
                ),
            ),
        ),
        (
            DoomMap(
                'freedoom1',
                'E1M5',
                (
                    'Walking through halls of tan bricks beside blue water, first person.',
                    'Tan brick halls of a base with water, seen by someone who walks there.',
                ),
            ),
        ),
    ),
}


def place(theme: str, seed: int) -> DoomMap:
    """The map of an episode. Odd seeds are held out, and no map has both."""
    maps = THEMES[theme].held_out if seed % 2 else THEMES[theme].maps
    return maps[seed // 2 % len(maps)]


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
        """Puts the walker somewhere in `level`, facing where there is room -> whether it worked."""
        if self.open != level:
            self._start(level)
        self.game.set_seed(seed % 2**31)
        self.game.new_episode()
        self.game.send_game_command('god')
        for _ in range(40):
            x, y = self._anywhere(rng)
            # Behind the first frames of an episode: the engine ignores what is pressed in them.
            self._act(STILL, 4)
            self.game.send_game_command(f'warp {x:.1f} {y:.1f}')
            self._act(STILL, 2)
            if self.over or np.hypot(*(self.pose()[:2] - (x, y))) > 1:
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

    def _start(self, level: DoomMap):
        vizdoom, root = self.vizdoom, os.path.dirname(self.vizdoom.__file__)
        if self.game is not None:
            self.game.close()
        game = self.game = vizdoom.DoomGame()
        freedoom = level.wad.startswith('freedoom')
        game.set_doom_game_path(f'{root}/{level.wad if freedoom else "freedoom2"}.wad')
        if not freedoom:
            game.set_doom_scenario_path(f'{root}/scenarios/{level.wad}.wad')
        game.set_doom_map(level.name)
        game.set_screen_resolution(vizdoom.ScreenResolution.RES_640X480)
        game.set_screen_format(vizdoom.ScreenFormat.RGB24)
        game.set_mode(vizdoom.Mode.PLAYER)
        game.set_window_visible(False)
        game.set_sound_enabled(False)
        for layer in (
            'hud',
            'weapon',
            'crosshair',
            'decals',
            'particles',
            'effects_sprites',
            'messages',
            'corpses',
            'screen_flashes',
        ):
            getattr(game, f'set_render_{layer}')(False)
        game.set_depth_buffer_enabled(True)
        game.set_sectors_info_enabled(True)
        button, variable = vizdoom.Button, vizdoom.GameVariable
        game.set_available_buttons(
            [
                button.MOVE_FORWARD,
                button.MOVE_BACKWARD,
                button.MOVE_LEFT,
                button.MOVE_RIGHT,
                button.LOOK_UP_DOWN_DELTA,
                button.TURN_LEFT_RIGHT_DELTA,
            ]
        )
        game.set_available_game_variables(
            [
                variable.POSITION_X,
                variable.POSITION_Y,
                variable.CAMERA_POSITION_Z,
                variable.ANGLE,
                variable.PITCH,
            ]
        )
        game.set_doom_skill(1)
        game.set_episode_timeout(0)
        game.add_game_args(
            '-nomonsters +movebob 0 +stillbob 0 +cl_showsecretmessage 0 +r_visibility 24'
        )
        with contextlib.chdir(self.folder.name):  # the engine leaves its settings where it starts
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
        """A point on some floor, not too near a wall."""
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
        """Whether the episode has ended: an exit was crossed."""
        return self.state is None

    def hold(self, keys, mouse, frames: int = FRAMES_PER_LATENT, draw: bool = True):
        """Holds keys and mouse -> (frames uint8 [F H W 3], poses float32 [F 6]); fewer than asked
        when the episode ends.

        Args:
          keys: W S A D, each 0 or 1.
          mouse: (pitch, yaw), up and right positive, in units of `records.MOUSE_RATE`.
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
        """Where the eye is now and where it looks, in the order of `records.POSE`."""
        x, y, z, yaw, pitch = self.state.game_variables
        return np.array([x, y, z, wrap(np.radians(yaw)), -wrap(np.radians(pitch)), 0.0])

    def frame(self) -> np.ndarray:
        """The picture now -> [H W 3] uint8."""
        from PIL import Image

        picture = Image.fromarray(self.state.screen_buffer[ROWS])
        return BRIGHT[np.asarray(picture.reduce(SUPERSAMPLE))]

    def sight(self) -> Sight:
        """What the depth buffer says: how far it is to a wall in directions from left to right."""
        depth = self.state.depth_buffer
        horizon = depth.shape[0] / 2 + FOCAL * np.tan(self.pose()[4])
        row = int(np.clip(horizon, 0, depth.shape[0] - 51))
        columns = np.arange(8, depth.shape[1], 16)
        ahead = depth[row : row + 20 : 4, columns].min(axis=0) * DEPTH
        # What is lower than the eye hides in these rows; nearer than that, it is too high to climb.
        low = depth[row + 50, columns] * DEPTH
        ahead = np.where(low < 90, np.minimum(ahead, low), ahead)
        bearing = np.arctan((depth.shape[1] / 2 - columns) / FOCAL)
        return Sight(ahead.astype(np.float64), bearing)


BRIGHT = np.round(255 * (np.arange(256) / 255) ** (1 / GAMMA)).astype(np.uint8)


def _inside(point, lines) -> bool:
    """Whether a point is in the polygon of lines [N 4], by crossings of a ray."""
    (x, y), (x1, y1, x2, y2) = point, lines.T
    across = (y1 > y) != (y2 > y)
    at = x1[across] + (y - y1[across]) / (y2 - y1)[across] * (x2 - x1)[across]
    return bool(np.count_nonzero(at > x) % 2)


def _distance(point, lines) -> float:
    """From a point to the nearest of lines [N 4]."""
    start, along = lines[:, :2], lines[:, 2:] - lines[:, :2]
    share = ((point - start) * along).sum(axis=1) / np.maximum((along**2).sum(axis=1), 1e-9)
    nearest = start + np.clip(share, 0, 1)[:, None] * along
    return float(np.hypot(*(point - nearest).T).min())


def record(game: VizDoomGame, seed: int, theme: str, frames: int, rng: np.random.Generator) -> Clip:
    """One episode of up to `frames` = 1 + 4k frames in the map of `place`; it ends early when the
    walker is moved by something else than keys.
    """
    level = place(theme, seed)
    explorer = Explorer(rng)
    while not (game.reset(level, seed, rng) and _warmed(game, explorer, rng)):
        explorer = Explorer(rng)
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


def _warmed(game: VizDoomGame, explorer: Explorer, rng) -> bool:
    """Some latent frames that nobody sees, so that most episodes start on the move."""
    explorer.start()
    for _ in range(2 + int(rng.integers(4))):
        _, poses = game.hold(*explorer.pressed(), draw=False)
        if game.over:
            return False
        explorer.moved(poses)
    return True


new_game = VizDoomGame  # what `collect` opens
