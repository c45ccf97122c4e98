"""PQN on MinAtar: our `pqn` beside purejaxql's own code with its own settings, at the same number of environment steps.

    python benchmarks/paper/pqn_minatar.py --purejaxql CHECKOUT [--peers-python PATH] [--only Asterix Breakout]
                                           [--seeds 3] [--again]

Each agent is trained alone, for 5 million environment steps, and the sides alternate. Ours has the settings that
`qfleet train` chooses for these games. Then each plays 100 fresh episodes, in which one action in a thousand is random.
The negative control is our network before it has learned anything. purejaxql (Gallici et al. 2024) isn't packaged, so
CHECKOUT is a folder with its repository; `make bench-peers` installs what it needs. Its side takes about a quarter of
an hour for a game and seed on one core, so the table takes a night.
"""

import functools

import common
import table

GAMES = ("Asterix", "Breakout", "Freeway", "SpaceInvaders")
ENV_STEPS = 5_000_000


def main() -> None:
    """Prints the table."""
    parser = table.parser(__doc__, num_seeds=3)
    parser.add_argument("--purejaxql", required=True, help="a checkout of purejaxql")
    parser.add_argument("--peers-python", default=str(common.HERE / ".peers" / "bin" / "python"))
    arguments = parser.parse_args()
    rows = []
    for game in GAMES:
        env = f"gymnax:{game}-MinAtar"
        untrained = table.ours(env, None, env_steps=4096, learning_rate=1e-12)
        theirs = functools.partial(purejaxql, arguments.purejaxql, arguments.peers_python, game)
        rows += [
            table.Row(game, "qfleet", table.ours(env, None, ENV_STEPS)),
            table.Row(game, "purejaxql", theirs),
            table.Row(game, "untrained", untrained, together=True),
        ]
    table.run("pqn_minatar", rows, arguments)


def purejaxql(checkout: str, python: str, game: str, seeds: range) -> list[table.Trained]:
    """Trains purejaxql's agents, one after another."""
    return [
        table.Trained(ENV_STEPS, result["seconds"], result["returns"])
        for seed in seeds
        for result in [common.peer(python, "purejaxql_minatar.py", checkout, game, str(ENV_STEPS), str(seed))]
    ]


if __name__ == "__main__":
    main()
