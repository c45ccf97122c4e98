"""Draws the pictures of docs/pictures/: the data flow of each topology, the ring, and lanes with chunks.

python docs/tools/pictures.py writes them.
"""

from pathlib import Path

from drawing import Drawing

FOLDER = Path(__file__).parents[1] / "pictures"


def fused() -> Drawing:
    """One compiled program."""
    it = Drawing(760, 330, "fused: lanes, Q-network, replay and learner in one compiled program on the device")
    it.frame(20, 16, 720, 214, "device: one compiled program")
    it.box(40, 60, 120, 56, "lanes", "acting")
    it.box(300, 60, 130, 56, "Q-network", "acting")
    it.box(560, 60, 150, 56, "parameters", "params")
    it.box(180, 160, 150, 52, "replay\nring, priorities", "replay")
    it.box(520, 160, 150, 52, "learner step", "learning")
    it.arrow((160, 76), (300, 76), label="observations")
    it.arrow((300, 102), (160, 102), label="actions", at=(230, 120))
    it.arrow((560, 88), (430, 88))
    it.arrow((100, 116), (100, 186), (180, 186), label="rows", at=(108, 150), anchor="start")
    it.arrow((330, 176), (520, 176), label="batches")
    it.arrow((520, 200), (330, 200), label="TD errors", at=(425, 217))
    it.arrow((620, 160), (620, 116), label="gradients", at=(628, 142), anchor="start")
    it.box(205, 262, 350, 44, "host, once a chunk (a quarter of a second)")
    it.arrow((300, 262), (300, 230), label="plan: exploration, learner steps per row", at=(290, 251), anchor="end")
    it.arrow((460, 230), (460, 262), label="statistics: returns, losses", at=(470, 251), anchor="start")
    return it


def overlapped() -> Drawing:
    """Environments outside the program."""
    it = Drawing(760, 290, "overlapped: environments on the host step while the learner on the device learns")
    it.frame(20, 16, 210, 220, "host")
    it.frame(350, 16, 390, 220, "device")
    it.box(36, 60, 178, 140, "environments\nthreads, or\nenvironment workers", "acting")
    it.box(366, 52, 120, 50, "Q-network", "acting")
    it.box(596, 52, 128, 50, "parameters", "params")
    it.box(366, 160, 120, 52, "replay", "replay")
    it.box(596, 160, 128, 52, "learner step", "learning")
    it.arrow((366, 78), (214, 78), label="actions", at=(290, 70))
    it.arrow((214, 184), (366, 184), label="observations,\nrewards", at=(290, 162))
    it.arrow((426, 160), (426, 102), label="newest row", at=(434, 136), anchor="start")
    it.arrow((596, 77), (486, 77))
    it.arrow((486, 176), (596, 176), label="batches")
    it.arrow((596, 200), (486, 200), label="TD errors", at=(541, 217))
    it.arrow((660, 160), (660, 102), label="gradients", at=(653, 136), anchor="end")
    it.text(380, 264, "Both halves work at the same time: a step of all lanes, and the learning from the row before.",
            "small", anchor="middle")  # fmt: skip
    return it


def mesh() -> Drawing:
    """Either of them on several devices."""
    it = Drawing(760, 360, "mesh: the data axis divides lanes, replay and batches, the model axis divides parameters")
    it.text(430, 28, "data axis: lanes, replay and batch are divided", "small", anchor="middle")
    it.arrow((120, 38), (740, 38), both=True)
    for i, line in enumerate(("model axis:", "parameters,", "target and", "optimiser", "are divided")):
        it.text(54, 172 + 16 * i, line, "small", anchor="middle")
    it.arrow((104, 56), (104, 346), both=True)
    for column, lanes in enumerate(("lanes 0 to 15", "lanes 16 to 31")):
        x = 120 + 364 * column
        for row, half in enumerate(("upper half", "lower half")):
            y = 56 + 164 * row
            it.frame(x, y, 256, 122, f"device {2 * row + column}")
            it.box(x + 12, y + 34, 122, 74, f"{lanes}\ntheir replay,\nhalf of a batch", "replay")
            it.box(x + 144, y + 34, 100, 74, f"{half}\nof the network", "params")
        it.arrow((x + 194, 178), (x + 194, 220), both=True)
        it.text(x + 184, 203, "activations", "small", anchor="end")
    for y in (80, 258):
        it.arrow((376, y), (484, y), both=True)
    for i, line in enumerate(("gradients:", "all-reduce, once", "a learner step;", "sampled batch,", "TD errors")):
        it.text(430, 134 + 18 * i, line, "small", anchor="middle")
    return it


def all_reduce() -> Drawing:
    """Equal processes in step."""
    it = Drawing(760, 250, "all-reduce: equal processes average their gradients at every learner step")
    for i in range(3):
        x = 20 + 245 * i
        it.frame(x, 16, 230, 130, f"process {i}")
        it.box(x + 12, 46, 64, 84, "lanes", "acting")
        it.box(x + 84, 46, 64, 84, "replay", "replay")
        it.box(x + 156, 46, 64, 84, "learner", "learning")
        it.arrow((x + 188, 130), (x + 188, 180), both=True)
    it.box(
        20, 180, 720, 48, "all-reduce at every learner step, no server\ngradients, sampled batches, TD errors", "params"
    )
    return it


def gossip() -> Drawing:
    """Peers that average in pairs."""
    it = Drawing(760, 300, "gossip: peers learn on their own and now and then two of them average their parameters")
    places = [(20, 16), (510, 16), (20, 172), (510, 172)]
    for i, (x, y) in enumerate(places):
        it.frame(x, y, 230, 112, f"peer {i}")
        it.box(x + 12, y + 34, 64, 64, "lanes", "acting")
        it.box(x + 84, y + 34, 64, 64, "replay", "replay")
        it.box(x + 156, y + 34, 64, 64, "learner", "learning")
    it.arrow((250, 72), (510, 72), label="parameters, now", both=True)
    it.arrow((250, 110), (510, 190), both=True, label="another pair, another time", at=(258, 182), anchor="start")
    it.text(380, 244, "Both move half of the way", "small", anchor="middle")
    it.text(380, 260, "to each other. Nobody waits.", "small", anchor="middle")
    return it


def actor_learner() -> Drawing:
    """Ape-X."""
    it = Drawing(760, 370, "actor-learner: actors fill replay shards, and one learner learns from them")
    it.frame(20, 16, 180, 268, "actors")
    for i, name in enumerate(("actor 0", "actor 1", "actor N - 1")):
        it.box(34, 46 + 78 * i, 152, 64, f"{name}\nlanes, an epsilon", "acting")
    for i, name in enumerate(("replay shard 0", "replay shard M - 1")):
        it.box(320, 62 + 108 * i, 160, 66, f"{name}\nring, sum tree", "replay")
    it.box(610, 102, 130, 92, "learner\non its mesh", "learning")
    for start, end in ((78, 95), (156, 196), (234, 212)):
        it.arrow((186, start), (320, end))
    it.text(262, 44, "chunks: rows and", "small", anchor="middle")
    it.text(262, 60, "their TD errors", "small", anchor="middle")
    it.arrow((480, 86), (610, 124), label="transitions", at=(546, 90))
    it.arrow((610, 144), (480, 110))
    it.arrow((480, 190), (610, 160))
    it.arrow((610, 180), (480, 214), label="TD errors", at=(550, 220))
    words = "parameters, by Ray's object store, for the actors that are about to act"
    it.arrow((675, 194), (675, 312), (110, 312), (110, 284), label=words, at=(400, 305))
    it.text(380, 346, "This process directs: what each of them does next, evaluation, metrics, checkpoints.",
            "small", anchor="middle")  # fmt: skip
    return it


def parameter_server() -> Drawing:
    """Gorila."""
    it = Drawing(760, 340, "parameter-server: workers send gradients to the shards of a server")
    for i, name in enumerate(("worker 0", "worker 1", "worker N - 1")):
        y = 24 + 92 * i
        it.frame(20, y, 340, 78, name)
        it.box(36, y + 30, 84, 38, "lanes", "acting")
        it.box(136, y + 30, 84, 38, "replay", "replay")
        it.box(236, y + 30, 108, 38, "gradients", "learning")
    it.frame(540, 24, 200, 262, "server")
    for i, name in enumerate(("shard 0", "shard M - 1")):
        it.box(556, 54 + 116 * i, 168, 96, f"{name}\nparameters, target\nnetwork, optimiser", "params")
    for i in range(3):
        it.arrow((360, 54 + 92 * i), (540, 104 + 38 * i))
        it.arrow((540, 120 + 38 * i), (360, 74 + 92 * i))
    it.text(450, 34, "gradients:", "small", anchor="middle")
    it.text(450, 50, "a piece for each shard", "small", anchor="middle")
    it.text(450, 266, "parameters:", "small", anchor="middle")
    it.text(450, 282, "a piece from each shard", "small", anchor="middle")
    it.text(380, 322, "Gradients are applied in the order of arrival, unless they are too stale or outliers.",
            "small", anchor="middle")  # fmt: skip
    return it


def ring() -> Drawing:
    """The replay's ring."""
    it = Drawing(760, 400, "ring: rows times lanes; an episode's final observation fills a row of its own")
    left, top, cell, high = 130, 66, 92, 34
    columns = [
        ["o0", "o1", "o2", "o3", "o4", "o5", "o6", "o7"],
        ["o5", "o6", "final", "o0", "o1", "o2", "o3", "o4"],
        ["o2", "o3", "o4", "o5", "o6", "o7", "final", "o0"],
        ["o1", "o2", "o3", "o4", "| o0", "o1", "o2", "o3"],
    ]
    for lane, observations in enumerate(columns):
        it.text(left + cell * lane + cell / 2, top - 12, f"lane {lane}", "small", anchor="middle")
        for row, name in enumerate(observations):
            kind = "break" if name == "final" or observations[row + 1 : row + 2] == ["| o0"] else "replay"
            label = "final" if name == "final" else name.removeprefix("| ")
            it.box(left + cell * lane + 3, top + high * row + 2, cell - 6, high - 5, label, kind)
    for row in range(8):
        it.text(left - 14, top + high * row + 22, f"row {row}", "small", anchor="end")
    head = top + 8 * high + 12
    it.arrow((84, head), (126, head))
    it.text(130, head + 4, "write head: the next row overwrites the oldest, row 0", "small")
    x = left + 4 * cell + 24
    for i, line in enumerate((
        "Each observation is stored once.",
        "The successor of row t is row t + 1.",
        "",
        "final: the last observation of an",
        "episode. No transition starts here,",
        "and a time limit bootstraps from it.",
        "",
        "lane 3 was replaced in mid-episode:",
        "its history is broken there, and",
        "nothing is learned across the break.",
    )):  # fmt: skip
        it.text(x, top + 20 + 21 * i, line, "small")
    it.legend(130, 378, {"replay": "can start a transition", "break": "cannot: the episode ends or breaks off here"})
    return it


def lanes() -> Drawing:
    """Lanes, rows and chunks."""
    it = Drawing(760, 300, "lanes: environments stepped together; rows of all lanes make chunks")
    left, top, cell, high = 100, 70, 36, 34
    ends = {0: [5, 12], 1: [9], 2: [2, 14], 3: [7]}
    for lane in range(4):
        it.text(left - 14, top + high * lane + 21, f"lane {lane}", "small", anchor="end")
        for row in range(16):
            kind = "break" if row in ends[lane] else "acting"
            it.box(left + cell * row + 2, top + high * lane + 3, cell - 5, high - 6, "", kind)
    for i in range(2):
        x = left + 8 * cell * i
        it.line(x + 2, 50, x + 8 * cell - 4, 50)
        it.line(x + 2, 50, x + 2, 58)
        it.line(x + 8 * cell - 4, 50, x + 8 * cell - 4, 58)
        it.text(x + 4 * cell, 40, f"chunk {i}: 8 rows of 4 lanes, 32 steps", "small", anchor="middle")
    it.arrow((left, 226), (left + 16 * cell, 226), label="time, in rows: one row is one step of every lane",
             at=(left + 8 * cell, 246))  # fmt: skip
    it.legend(100, 280, {"acting": "an environment step", "break": "the row of a final observation"})
    return it


PICTURES = {
    "fused": fused,
    "overlapped": overlapped,
    "mesh": mesh,
    "all-reduce": all_reduce,
    "gossip": gossip,
    "actor-learner": actor_learner,
    "parameter-server": parameter_server,
    "ring": ring,
    "lanes": lanes,
}


def main() -> None:
    """Writes all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
