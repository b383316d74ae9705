"""Play a world in the browser: hold a key and the next frames obey.

tools/play.py                                  the bundled world, for this machine
tools/play.py --host 0.0.0.0 --token SECRET12  for others, who must know the token
tools/play.py --ray --worlds 1-4               for many: worlds on a Ray cluster, as needed
tools/play.py carracing doom:DMD=FOLDER        several worlds, with weights that none brings
"""

from matrix_jax import config
from matrix_jax.cli.arguments import recipes, whole


def main(argv):
    """Exit codes: 0 stopped, 2 bad input."""
    from matrix_jax.serve.cluster import workers
    from matrix_jax.serve.web import server

    parser = config.Parser(__doc__)
    add, usual, many = parser.add_argument, server.Config(), workers.Config()
    add(
        '--players',
        type=whole(1, 1024),
        default=usual.players,
        help=f'places in each world, fixed at the start (default {usual.players})',
    )
    add('--host', default=usual.host, help='address to listen on (default: this machine only)')
    add('--port', type=int, default=usual.port, help=f'default {usual.port}; 0 takes a free one')
    add('--token', help='what players must know; needed for any other address')
    add(
        '--entry',
        choices=('head', 'tail'),
        default=usual.entry,
        help='where keys bind: head is seen soonest, tail is as published (default head)',
    )
    add(
        '--together',
        type=whole(1, 1024),
        default=usual.together,
        help='players computed side by side, for accelerators (default 1)',
    )
    add(
        '--ray',
        action='store_true',
        help='joins the Ray cluster of RAY_ADDRESS or of this machine, or starts one',
    )
    add(
        '--worlds',
        metavar='N-M',
        help='with --ray: copies of the world, each with --players places; more start while '
        f'players wait (default {many.fewest}-{many.most})',
    )
    add('--gpus', type=float, help='with --ray: of each world (default: as its mesh, if any)')
    add(
        '--drain',
        type=float,
        help=f'with --ray: seconds for players to finish (default {many.drain:.0f})',
    )
    options, runs = parser.run(argv, many=recipes)
    given = {
        name: value
        for name in ('worlds', 'gpus', 'drain')
        if (value := getattr(options, name)) is not None
    }
    if given and not options.ray:
        raise config.UsageError(
            ' and '.join(f'--{name}: got {value}' for name, value in given.items())
            + ', expected --ray with it'
        )
    if options.ray and len(runs) > 1:
        raise config.UsageError(f'--ray: got {len(runs)} recipes, expected one with it')
    if options.together > options.players:
        raise config.UsageError(
            f'--together: got {options.together}, expected 1 to the players, {options.players}'
        )
    with config.door():
        cfg = server.Config(
            players=options.players,
            together=options.together,
            entry=options.entry,
            host=options.host,
            port=options.port,
            token=options.token,
        )
        if options.ray:
            if 'worlds' in given:
                given['fewest'], given['most'] = workers.parse_worlds(given.pop('worlds'))
            workers.serve(runs[0], cfg, workers.Config(**given))
        else:
            server.serve(runs, cfg)


if __name__ == '__main__':
    config.main_guard(main)
