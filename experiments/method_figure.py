"""docs/figures/method.svg: the method in one picture, with the numbers of one really replaced slot.

experiments/one_step.py writes it, and the slot, experiments/replaced_slot.json, from a run of
npo.py; advantages, pass-rate and D* are computed here.
"""

import json
import statistics
from html import escape
from pathlib import Path

import numpy

from signal_theory import optimal_distance, quality, signal, variance

GATE = 0.6  # npo.py's default
ALPHA, BETA = 0.04, 0.0326  # of the inset: D* = 20
SIZE = 'width="900" height="474"'
STYLE = """
text { font: 14px system-ui, "Segoe UI", Helvetica, Arial, sans-serif; fill: currentColor }
.mono { font: 13px ui-monospace, Menlo, Consolas, monospace; white-space: pre }
.small { font-size: 12.5px } .sub { font-size: 11px } .bold { font-weight: 600 }
.middle { text-anchor: middle } .end { text-anchor: end }
.line { fill: none; stroke: currentColor; stroke-width: 2 } .fill { fill: currentColor }
.thick { stroke-width: 4 } .dashed { stroke-dasharray: 5 4 }
.box { fill: #f6f8fa; stroke: currentColor; stroke-width: 2 } .paper { fill: #fff }
.ink { color: #1f2328 } .soft { color: #6e7781 } .npo { color: #bc4c00 }
.good { color: #1a7f37 } .bad { color: #cf222e }
@media (prefers-color-scheme: dark) {
.box { fill: #161b22 } .paper { fill: #0d1117 }
.ink { color: #e6edf3 } .soft { color: #9198a1 } .npo { color: #f0883e }
.good { color: #3fb950 } .bad { color: #ff7b72 }
}
"""
DESCRIPTION = (
    "A scout trains D steps ahead of pi_t with plain GRPO. Its end, pi_t+D, answers the prompts of "
    "these steps; one right answer per prompt is kept. Weights go back to pi_t and the same steps "
    "are taken again. Among eight wrong answers the guide's replaces the last: its advantage is "
    "{guide}, that of the others {own}; its ratio is against pi_t+D, theirs against the policy of "
    "that step. Inset: "
    "Q and V rise with the distance D, and Q/V peaks in between."
)


def text(x: float, y: float, words: str, classes: str = "ink") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{classes}">{words}</text>'


def pi(index: str) -> str:
    return f'π<tspan dy="4" class="sub">{index}</tspan>'


def mark(right: bool) -> str:
    return f'<tspan class="{"good" if right else "bad"}">{"✓" if right else "✗"}</tspan>'


def path(data: str, classes: str, arrow: bool = False) -> str:
    head = f' marker-end="url(#{classes.split()[0]})"' if arrow else ""
    return f'<path d="{data}" class="line {classes}"{head}/>'


def box(x: int, y: int, width: int, height: int, classes: str) -> str:
    size = f'width="{width}" height="{height}"'
    return f'<rect x="{x}" y="{y}" {size} rx="6" class="box {classes}"/>'


def node(x: int, y: int, classes: str = "ink") -> str:
    return f'<circle cx="{x}" cy="{y}" r="7" class="fill {classes}"/>'


def advantages(slot: dict) -> list[str]:
    """Of the group with the guide's answer: (r - mean) / (std + 1e-6), ddof 1, as in grpo.py."""
    rewards = [*slot["rewards"][:-1], slot["guide_reward"]]
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [f"{(reward - mean) / (std + 1e-6):+.3f}".replace("-", "−") for reward in rewards]


def end(boxed: str) -> str:
    """The last total of a boxed working, as in "… 40": all of it would be too wide for a slot."""
    *before, last = boxed.split(" ")
    return f"… {last}" if before else last


def journey() -> list[str]:
    """The time axis: scout, guide cache, back, replay."""
    return [
        path("M40 34 H560", "soft", arrow=True) + text(568, 39, "step", "soft small"),
        path("M70 29 V39 M430 29 V39", "soft"),
        text(70, 22, "t", "ink middle") + text(430, 22, "t + D", "ink middle"),
        path("M70 130 C90 72 100 72 140 72 H418", "soft thick", arrow=True),
        text(245, 62, "scout: plain GRPO, D steps ahead", "ink middle"),
        path("M430 80 V100", "soft", arrow=True),
        text(442, 94, "8 answers to each prompt", "soft small"),
        box(327, 104, 206, 54, "soft"),
        text(430, 127, "guide.jsonl", "ink middle bold"),
        text(430, 147, f"prompt, {mark(True)} answer, log-probs", "ink middle small"),
        path("M325 130 H92", "soft dashed", arrow=True),
        text(208, 122, "weights and optimizer go back", "ink middle small"),
        text(208, 147, "the answers stay", "ink middle small"),
        path("M70 130 C90 200 100 200 140 200 H430", "npo thick"),
        path("M430 200 H545", "npo", arrow=True),
        text(245, 190, "replay: the same prompts, guided", "npo middle bold"),
        text(490, 190, "plain GRPO", "npo middle small"),
        node(70, 130) + node(430, 72),
        text(42, 134, pi("t")) + text(446, 68, pi("t+D") + '<tspan dy="-4">: the guide</tspan>'),
    ]


def inset() -> list[str]:
    """Why a near future: Q, V and S over the distance, each on a scale of its own."""
    left, right, top, bottom = 660, 880, 58, 186
    distance = numpy.linspace(0, 70, 29)
    of_quality, of_variance = quality(distance, ALPHA), variance(distance, BETA)
    peak = left + (right - left) * optimal_distance(ALPHA, BETA) / distance[-1]

    def drawn(values: numpy.ndarray, classes: str, share: float) -> str:
        x = left + (right - left) * distance / distance[-1]
        y = bottom - (bottom - top) * share * values / values.max()
        return path("M" + " ".join(f"{a:.0f},{b:.1f}" for a, b in zip(x, y)), classes)

    return [
        text(656, 22, "Why near? The paper:", "ink bold")
        + text(656, 42, "S = Q/V peaks in between"),
        path(f"M{left} {top} V{bottom} H{right}", "soft"),
        drawn(of_quality, "good", 0.8),
        drawn(of_variance, "soft", 1.0),
        drawn(signal(of_quality, of_variance), "npo thick", 0.55),
        path(f"M{peak:.0f} {bottom} V{bottom - 76}", "npo dashed"),
        text(peak, bottom + 17, "D*", "npo middle bold"),
        text(right, bottom + 17, "distance D", "soft small end"),
        text(right - 20, 72, "V: noise", "soft small end"),
        text(right - 92, 90, "Q: solves more", "good small end"),
        text(right - 4, bottom - 9, "S", "npo bold end"),
    ]


def group(slot: dict) -> list[str]:
    """Eight slots; the guide's answer has pushed the last one out, which stays visible."""
    left, step, width, top, height, count = 138, 80, 72, 300, 42, len(slot["rewards"])
    rate = sum(answer == slot["gold"] for answer in slot["boxed"]) / count
    last, out = left + step * (count - 1), left + step * count + 36
    middle = last + width // 2
    way = f"M535 130 H572 Q590 130 590 148 V248 Q590 266 608 266 H{middle - 18} Q{middle} 266 "
    question = f'<tspan class="bold">One group of {count}:</tspan> {slot["question"]}'
    parts = [
        path(f"{way}{middle} 284 V296", "npo", arrow=True),
        '<path d="M578 206 H602 L578 238 H602 Z" class="fill npo"/>',  # a valve
        text(612, 227, f"gate: pass-rate ≤ {GATE} (here {rate:g})", "ink small"),
        text(middle - 12, 288, "the guide's answer takes the last slot", "npo small end"),
        node(245, 200, "npo") + path("M245 208 V256", "npo dashed"),
        text(20, 280, f"{question} Gold {end(slot['gold'])}."),
    ]
    ratio = f'ratio: {pi("θ")}<tspan dx="4" dy="-4">over</tspan>'
    for y, words in ((326, "answer"), (370, "advantage A"), (394, ratio)):
        parts.append(text(20, y, words, "soft small"))
    answers = [*slot["boxed"][:-1], slot["guide_boxed"]]
    for i, (answer, advantage) in enumerate(zip(answers, advantages(slot))):
        x, guided = left + step * i, i == count - 1
        kind = "npo" if guided else "ink"
        words = f"{end(answer)} {mark(answer == slot['gold'])}"
        parts += [
            box(x, top, width, height, "npo" if guided else "soft"),
            text(x + 36, top + 27, words, "ink middle"),
            text(x + 36, 370, advantage, f"{kind} middle{' bold' if guided else ''}"),
            text(x + 36, 394, pi("t+D" if guided else "old"), f"{kind} middle"),
        ]
    return parts + [
        path(f"M{last + width + 4} {top + 21} H{out - 6}", "soft", arrow=True),
        box(out, top, width, height, "soft dashed"),
        text(out + 36, top + 27, f"{end(slot['boxed'][-1])} {mark(False)}", "soft middle"),
        path(f"M{out + 6} {top + height - 6} L{out + width - 6} {top + 6}", "bad"),
        text(out + 36, 370, "discarded", "soft small middle"),
    ]


def texts(slot: dict) -> list[str]:
    """The discarded answer and the guide's, whose differing tokens stand out."""
    before, after = slot["policy"].split(" "), slot["guide"].split(" ")
    shown = [b if a == b else f'<tspan class="npo">{b}</tspan>' for a, b in zip(before, after)]
    return [
        text(20, 432, "policy", "soft mono") + text(20, 456, slot["source"], "soft mono"),
        text(138, 432, f"{' '.join(before)} {mark(False)}", "ink mono"),
        text(138, 456, f"{' '.join(shown)} {mark(True)}", "ink mono"),
    ]


def method_figure() -> str:
    """The SVG."""
    slot = json.loads((Path(__file__).parent / "replaced_slot.json").read_text())
    own, *_, guide = advantages(slot)
    marker = 'viewBox="0 0 10 10" refX="8" refY="5" markerUnits="userSpaceOnUse" orient="auto"'
    heads = [
        f'<marker id="{name}" {marker} markerWidth="11" markerHeight="11">'
        f'<path d="M0 0 L10 5 L0 10 Z" class="fill {name}"/></marker>'
        for name in ("soft", "npo")
    ]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 474" {SIZE} role="img">',
        "<title>Near-Future Policy Optimization in one picture</title>",
        f"<desc>{escape(DESCRIPTION.format(own=own, guide=guide))}</desc>",
        f"<style>{STYLE}</style>",
        f"<defs>{''.join(heads)}</defs>",
        f'<rect {SIZE} class="paper"/>',
        *(*journey(), *inset(), *group(slot), *texts(slot)),
        "</svg>\n",
    ]
    return "\n".join(lines)
