"""The runs of docs/protocol.md: groups, rows, their commands and seeds.

A row's name is "group/name", and its directory experiments/runs/group/name-SEED. A command may
take a checkpoint of the same seed's run of another row: {cards/grpo@40} is that of step 40,
{plateau/sibling>.36} the first with an exact accuracy on the staircase's part B above .36.
"""

from dataclasses import dataclass

SCOUT, WINDOW, LONG = 40, 60, 200  # cards: guided steps; steps of a row; steps of plain GRPO
PLATEAU, AFTER = 60, 40  # staircase: steps to the start; steps of every arm from there ...
LONGER = 120  # ... and of four arms: a near guide lifts B in 40 steps, but breaks out in about 80
LEVELS = ".01", ".16", ".36", ".90"  # exact B of the guides; a borrow's q is its square root
RIVALS = 100  # steps of the rivals


@dataclass(frozen=True)
class Run:
    row: str
    command: str
    shift: int = 0  # added to the seed: a sibling's
    steps: tuple[int, ...] = ()  # {steps} in the command, in turn, until B is above the last level
    seed: int = 0
    out: str = ""  # run directory, relative to the repository's root


# The staircase: does a guide break a plateau, and is a near one better than a far one?
ON = f"--model staircase --eval-every 5 --start {{plateau/start@{PLATEAU}}}"
SHORT, LONG_ON = (f"{ON} --steps {PLATEAU + steps}" for steps in (AFTER, LONGER))
GUIDED = f"npo.py {SHORT} --guided-until {PLATEAU + AFTER} --guide"
GUIDED_ON = f"npo.py {LONG_ON} --guided-until {PLATEAU + LONGER} --guide"
SIBLING = "grpo.py --model staircase --borrow-rate 0.05 --eval-every 2 --save-every 2"
LOW, LOWER, NEAR, FAR = (f"{{plateau/sibling>{level}}}" for level in LEVELS)
PLATEAUS = [
    Run("plateau/start", f"grpo.py --model staircase --steps {PLATEAU} --eval-every 10"),
    Run("plateau/sibling", f"{SIBLING} --steps {{steps}}", 20, (60, 90, 120, 150, 200, 250, 300)),
    Run("plateau/near", f"{GUIDED_ON} {NEAR}"),
    Run("plateau/far", f"{GUIDED_ON} {FAR}"),
    Run("plateau/self", f"{GUIDED_ON} self"),
    Run("plateau/grpo", f"grpo.py {LONG_ON}"),
    Run("plateau/near-no-is", f"{GUIDED} {NEAR} --no-is-correction"),
    Run("plateau/far-no-is", f"{GUIDED} {FAR} --no-is-correction"),
    Run("plateau/grpo-16", f"grpo.py {SHORT} --group-size 16"),
    Run("plateau/low", f"{GUIDED} {LOW}"),
    Run("plateau/lower", f"{GUIDED} {LOWER}"),
]

# A run's own future, early and late. GRPO goes on for as many tokens as early-80 or late-160
# samples, the guide's answers to 8 prompts a step included
OWN, END = "--model staircase --borrow-rate 0.02 --eval-every 5", PLATEAU + AFTER
LATE = f"--start {{future/grpo@{PLATEAU}}}"


def own(step: int, flags: str = "") -> str:
    """Guided by the run's own checkpoint up to its step, but not beyond the end."""
    until = f"--steps {END} --guided-until {min(step, END)}"
    return " ".join(f"npo.py {OWN} {flags} {until} --guide {{future/grpo@{step}}}".split())


FUTURES = [
    Run("future/grpo", f"grpo.py {OWN} --steps 260"),
    *(Run(f"future/early-{step}", own(step)) for step in (40, 80, 160)),
    *(Run(f"future/late-{step}", own(step, LATE)) for step in (80, 120, 160)),
    Run("future/late-160-no-is", own(160, f"{LATE} --no-is-correction")),
]

# The counter-example: one decisive token
ONE = [
    Run(
        run.row.replace("plateau", "one"),
        run.command.replace("plateau/", "one/").replace("staircase", "staircase --borrows 1"),
        run.shift,
        run.steps,
    )
    for run in PLATEAUS
    if run.row.split("/")[1] in ("start", "sibling", "near", "far", "self", "grpo", "near-no-is")
]

# The cards: every guide guides the same steps, and GRPO goes on as scout and for equal tokens
CARDS = f"npo.py --steps {WINDOW} --guided-until {SCOUT} --guide"
THEN = f"npo.py --steps {RIVALS} --guided-until {RIVALS} --guide"
CARD_ROWS = [
    Run("cards/grpo", f"grpo.py --steps {LONG} --save-every 10"),
    Run("cards/40", f"{CARDS} {{cards/grpo@40}}"),
    Run("cards/self", f"{CARDS} self"),
    Run("cards/grpo-16", f"grpo.py --steps {WINDOW} --group-size 16"),
    Run("cards/160", f"{CARDS} {{cards/grpo@160}}"),
    Run("cards/20", f"{CARDS} {{cards/grpo@20}}"),
    Run("cards/80", f"{CARDS} {{cards/grpo@80}}"),
    Run("cards/10", f"{CARDS} {{cards/grpo@10}}"),
    Run("cards/40-no-is", f"{CARDS} {{cards/grpo@40}} --no-is-correction"),
    Run("cards/160-no-is", f"{CARDS} {{cards/grpo@160}} --no-is-correction"),
    Run("cards/teacher", f"{CARDS} worlds/cards_teacher"),
    Run("cards/40-slots-2", f"{CARDS} {{cards/grpo@40}} --slots 2"),
    Run("cards/40-slots-4", f"{CARDS} {{cards/grpo@40}} --slots 4"),
]
# Sampled evaluations cost as much as sixteen steps each
LAX = "--model cards_lax --eval-every 20"
LAXES = [
    Run("lax/grpo", f"grpo.py {LAX} --steps 160"),
    *(
        Run(f"lax/{step}{name}", f"{CARDS} {{lax/grpo@{step}}} {LAX}{flag}")
        for step in (40, 160)
        for name, flag in (("", ""), ("-no-is", " --no-is-correction"))
    ),
]

# The rivals, and where the source of an answer and the trigger part
RIVAL_ROWS = [
    Run("rivals/luffy", f"-m commands.luffy --steps {RIVALS}"),
    Run("rivals/luffy-160", f"-m commands.luffy --steps {RIVALS} --guide {{cards/grpo@160}}"),
    Run("rivals/exgrpo", f"-m commands.exgrpo --steps {RIVALS}"),
    Run(
        "rivals/rlep",
        f"-m commands.rlep --steps {RIVALS} --guide-samples 8 --guide {{cards/grpo@160}}",
    ),
    Run("rivals/future", f"{THEN} {{cards/grpo@40}}"),
    Run("rivals/future-failed", f"{THEN} {{cards/grpo@40}} --gate 0"),
    Run("rivals/past-failed", f"{THEN} {{cards/grpo@20}} --gate 0"),
    Run("rivals/teacher-failed", f"{THEN} worlds/cards_teacher --gate 0"),
    Run("rivals/teacher", f"{THEN} worlds/cards_teacher"),
    Run("rivals/teacher-no-is", f"{THEN} worlds/cards_teacher --no-is-correction"),
]

# AutoNPO; a fixed distance, once: at its first confirmed warning, or at step 120 whatever happens;
# and going on
FIXED = "--save-every 40 --max-distance 40 --cooldown 1000"
ALWAYS = f"{FIXED} --patience 100 --min-gain 9 --entropy-drop -99 --confirm-pass-rate 0"
AUTO = [
    Run(f"autonpo/{world}-{name}", f"{command} --model {flags} --eval-every 10")
    for world, flags in (("cards", "cards"), ("staircase", "staircase --borrow-rate 0.02"))
    for name, command in (
        ("auto", "autonpo.py --steps 200"),
        ("fixed", f"autonpo.py --steps 200 {FIXED}"),
        ("always", f"autonpo.py --steps 200 {ALWAYS}"),
        ("grpo", "grpo.py --steps 300"),
    )
]

# Group -> its rows, each after those that it needs; the reported seeds; the file of its lines
GROUPS = {
    "plateau": (PLATEAUS, range(10, 22), "staircase"),
    "future": (FUTURES, range(10, 22), "staircase"),
    "one": (ONE, range(10, 16), "staircase"),
    "cards": (CARD_ROWS, range(10, 20), "cards"),
    "rivals": (RIVAL_ROWS, range(10, 16), "cards"),
    "lax": (LAXES, range(10, 20), "cards"),
    "autonpo": (AUTO, range(10, 16), "autonpo"),
}
ROWS = {run.row: run for rows, _, _ in GROUPS.values() for run in rows}
