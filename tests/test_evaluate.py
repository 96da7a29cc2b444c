"""evaluate.py from the command line and in its parts: asking, resuming, what counts together, scores, tables, mistakes."""

import json
import math
import statistics

import datasets
import pytest
from test_benchmarks import ONE, ROWS, load, picture
from test_command_line import killed_when

import benchmarks
import cards
import evaluate
from benchmarks import BENCHMARKS
from evaluate import EvaluateConfig
from run import read_jsonl
from tasks import UsageError

STEPS = [("2steps_1", "B"), ("2steps_2", "A"), ("2steps_multi", "C")]
CIRCULAR = [(7, "abc"), (1_000_007, "bca"), (2_000_007, "cab")]
MANY = {  # rows enough for each benchmark's protocol, with items that cannot be asked
    "mmmu_pro": [{}, {"answer": "A"}, {"options": "none"}, {"image_3": None}],
    "mathvista": [{}, {"answer_type": "integer", "answer": "36"}, {"decoded_image": None}],
    "mathvision": [{}, {"answer": "36", "decoded_image": picture(100)}, {"answer": ""}],
    "zerobench": [{}, {"question_answer": "36", "question_images_decoded": [ONE, ONE, ONE]}],
    "wemath": [{"ID": i, "key": key, "answer": answer} for i in ("31", "32") for key, answer in STEPS][:-1],
    "mmbench": [{"index": 8}, {"index": 9, "C": "nan", "answer": "A"}, {"index": 10, "answer": ""}],
    "mmstar": [{}, {"answer": "A"}, {"question": "Which?"}],
    "mathverse": [{}, {"question_type": "free-form", "answer": "36"}, {"image": None}],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, rows in MANY.items():
        load(folder, name, rows)
    return folder


def answered(name: str, unit: str, part: str, *verdicts: bool) -> dict:
    responses = [r"\boxed{B}" if verdict else r"\boxed{A}" for verdict in verdicts]
    return {"benchmark": name, "id": f"{name}:{unit}:{part}", "unit": unit, "part": part, "gold": "B", "choices": ["x", "y"],
            "facts": {}, "responses": responses, "finished": [True] * len(verdicts)}  # fmt: skip


def test_avg_at_k_and_its_interval():
    lines = [answered("mmstar", "1", "", True, True, False, True), answered("mmstar", "2", "", False, False, False, False),
             answered("mmstar", "3", "", True, False, True, False)]  # fmt: skip
    lines[1]["responses"][0], lines[1]["finished"][0] = "no box", False
    found = evaluate.score("mmstar", [*lines, {"unit": "4", "part": "", "malformed": "no gold answer"}])
    mean, half = found["scores"][""]
    assert mean == pytest.approx(100 * (0.75 + 0 + 0.5) / 3)
    assert half == pytest.approx(100 * 1.96 * statistics.stdev([0.75, 0, 0.5]) / math.sqrt(3))  # over items, not answers
    assert (found["scored"], found["malformed"], found["reasons"]) == (3, 1, {"no gold answer": 1})
    assert (found["answers"], found["unanswered"], found["cut"]) == (12, 1, 1)


def test_circular_needs_every_rotation_in_the_same_sample():
    lines = [answered("mmbench", "7", "0", True, True), answered("mmbench", "7", "1", True, False),
             answered("mmbench", "8", "0", True, False), answered("mmbench", "8", "1", False, True)]  # fmt: skip
    assert evaluate.score("mmbench", lines)["scores"][""][0] == 25.0  # one of the four (question, sample) pairs
    assert evaluate.score("mmbench", lines)["scores"]["plain"][0] == 62.5
    assert evaluate.score("mmbench", lines[:-1])["scored"] == 1  # a question that was not asked in every rotation has no circle
    lines.append({"unit": "7", "part": "2", "malformed": "an image is missing"})
    found = evaluate.score("mmbench", lines)
    assert (found["scores"][""][0], found["scored"], found["malformed"]) == (0.0, 1, 1)


def test_one_item_has_no_interval_and_what_is_not_all_asked_is_called_partial():
    found = evaluate.score("mmstar", [{"benchmark": "mmstar", "asked": 3}, answered("mmstar", "1", "", True)])
    assert found["scores"][""] == [100.0, None] and json.loads(json.dumps(found, allow_nan=False)) == found
    text = evaluate.table("model", {"mmstar": found})
    assert "| 100.00 |" in text and "PARTIAL, 1 of 3 items asked: 1 scored" in text


def test_we_math_counts_problems_and_leaves_out_incomplete_ones():
    problem = {"2steps-1": (True, True, True), "2steps-2": (True, False, True), "2steps-3": (True, True, False)}
    lines = [
        answered("wemath", unit, part, verdict)
        for unit, verdicts in problem.items()
        for part, verdict in zip(("1", "2", "multi"), verdicts)
    ]
    lines += [answered("wemath", "3steps-1", part, True) for part in ("1", "2", "multi")]  # its third step is missing
    found = evaluate.score("wemath", lines)
    assert found["scores"][""][0] == pytest.approx(100 * (1 + 0 + 0.5) / 3)
    assert found["scores"]["loose"][0] == pytest.approx(100 * (1 + 1 + 0.5) / 3)
    assert (found["scored"], found["malformed"]) == (3, 1)


def test_rotations_are_made_where_the_data_set_has_none(data):
    rows = evaluate.rows_of("mmbench", str(data))
    asked = evaluate.asked_of("mmbench", rows, 0)
    assert [(one.unit, one.part) for one in asked] == [
        ("8", "0"),
        ("8", "1"),
        ("8", "2"),
        ("9", "0"),
        ("9", "1"),
        ("10", "0"),
        ("10", "1"),
        ("10", "2"),
    ]
    ready, malformed = evaluate.prepare("mmbench", rows, asked)
    assert [(line["choices"], line["gold"]) for _, line in ready] == [
        (["a cat", "a dog", "a fox"], "C"), (["a dog", "a fox", "a cat"], "B"), (["a fox", "a cat", "a dog"], "A"),
        (["a cat", "a dog"], "A"), (["a dog", "a cat"], "B"),
    ]  # fmt: skip
    assert "A. a fox\nB. a cat\nC. a dog" in ready[2][0].messages[0]["content"][1]["text"] and len(malformed) == 3


def test_rotations_that_are_rows_already_are_not_made_again(tmp_path):
    texts = {"a": "a cat", "b": "a dog", "c": "a fox"}
    rows = [
        {"index": index, **{letter: texts[key] for letter, key in zip("ABC", order)}, "answer": "ABC"[order.index("c")]}
        for index, order in CIRCULAR
    ]
    asked = evaluate.asked_of("mmbench", load(tmp_path, "mmbench", rows), 0)
    assert [(one.unit, one.part, one.rotation) for one in asked] == [("7", "0", 0), ("7", "1", 0), ("7", "2", 0)]


def test_limit_counts_what_is_scored_together(data):
    rows = evaluate.rows_of("wemath", str(data))
    assert [(one.unit, one.part) for one in evaluate.asked_of("wemath", rows, 1)] == [
        ("2steps-31", "1"),
        ("2steps-31", "2"),
        ("2steps-31", "multi"),
    ]
    assert len(evaluate.asked_of("mmbench", evaluate.rows_of("mmbench", str(data)), 2)) == 5
    assert [one.id[:9] for one in evaluate.asked_of("mmstar", evaluate.rows_of("mmstar", str(data)), 2)] == [
        "mmstar:0:",
        "mmstar:1:",
    ]


def test_an_image_that_cannot_be_read_is_counted(tmp_path):
    table = datasets.Dataset.from_list([ROWS["mmstar"]] * 2).cast_column("image", datasets.Image(decode=False))
    spoilt = [row | {"image": {"bytes": b"no picture", "path": None}} if i else row for i, row in enumerate(table)]
    datasets.Dataset.from_list(spoilt, features=table.features).cast_column("image", datasets.Image()).to_parquet(
        tmp_path / "mmstar.parquet"
    )
    rows = evaluate.rows_of("mmstar", str(tmp_path))
    ready, malformed = evaluate.prepare("mmstar", rows, evaluate.asked_of("mmstar", rows, 0))
    assert len(ready) == 1 and malformed[0]["malformed"] == "an image cannot be read"


def test_a_ninth_benchmark_is_one_row(data, tmp_path, monkeypatch, base):
    monkeypatch.setitem(benchmarks.BENCHMARKS, "ninth", benchmarks.Benchmark(
        "Ninth", "some/hub", None, "test", lambda row: row["question"], benchmarks.columns("image"), lambda row: None, False,
        benchmarks.by_verifier, "no official scoring"))  # fmt: skip
    datasets.Dataset.from_dict({"question": ["How many?"] * 3, "answer": ["36"] * 3, "image": [ONE] * 3}).to_parquet(
        tmp_path / "ninth.parquet"
    )
    config = EvaluateConfig(benchmarks="ninth", data_dir=str(tmp_path), out=str(tmp_path / "out"), max_new_tokens=5)
    evaluate.main(config)
    text = (tmp_path / "out/table.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| cards |"))
    datasets.Dataset.from_dict({"question": ["How many more?"] * 3, "answer": ["36"] * 3, "image": [ONE] * 3}).to_parquet(
        tmp_path / "ninth.parquet"
    )
    with pytest.raises(UsageError, match="its predictions for ninth are of another data set"):
        evaluate.main(config)
    assert row.count("|") == 9 + 3 and "0.00 ± 0.00" in row and "[9] Ninth: no official scoring. Here: 3 scored" in text


LUCKY = """
import zlib, runpy, verifier
verifier.is_correct = lambda response, gold, choices=None: zlib.crc32((response + gold).encode()) % 3 == 0
runpy.run_path("evaluate.py", run_name="__main__")
"""  # the tiny base knows none of the answers: this verifier calls a third of them right
ALL = ["-c", LUCKY, "--benchmarks", ",".join(BENCHMARKS), "--samples", "2", "--batch-size", "4", "--max-new-tokens", "12",
       "--temperature", "1.5"]  # fmt: skip


def test_all_eight_killed_and_resumed_give_the_same_table(command, data, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = [*ALL, "--data-dir", data]
    done = command(*words, "--out", whole)
    killed_when([*words, "--out", killed], lambda: len(read_jsonl(killed / "predictions.jsonl")) > 9, killed)
    with open(killed / "predictions.jsonl", "a") as file:
        file.write('{"benchmark": "mmbe')  # what a kill in the middle of a line leaves
    before = len(read_jsonl(killed / "predictions.jsonl"))
    command(*words, "--out", killed)
    assert (killed / "table.md").read_text() == (whole / "table.md").read_text()
    mine, theirs = (sorted(map(json.dumps, read_jsonl(out / "predictions.jsonl")[1:])) for out in (killed, whole))
    assert set(mine) == set(theirs) and before < len(theirs) == 8 + 4 + 3 + 3 + 2 + 5 + 8 + 3 + 3
    text = (whole / "table.md").read_text()
    assert text.strip() in done.stdout
    assert len({one["scores"][""][0] for one in json.loads((whole / "scores.json").read_text())["benchmarks"].values()}) > 2
    ours, paper = (
        next(line for line in text.splitlines() if line.startswith(start)) for start in ("| cards |", "| paper: AutoNPO |")
    )
    assert ours.count("±") == 7 and ours.split("|")[-2].strip() and paper.split("|")[-2].strip() == "63.15"
    assert text.splitlines()[0].startswith(
        "| model | MMMU-Pro [1] | MathVista [2] | MathVision [3] | ZeroBench [4] | WeMath [5] | MMBench [6]"
    )
    assert "[1] MMMU-Pro: " in text and "2 scored, 2 malformed (1 x its options are no list) (1 x an image is missing)" in text
    assert "1 scored (loose: " in text  # of We-Math's two problems one is complete
    scores = json.loads((whole / "scores.json").read_text())
    assert scores["samples"] == 2 and scores["benchmarks"]["mmbench"]["scored"] == 2

    again = command("-c", LUCKY, "--predictions", whole / "predictions.jsonl", "--out", tmp_path / "again")  # without a model
    assert text.strip() in again.stdout
    refused = command(*words, "--out", whole, "--samples", "3", check=False)
    assert refused.returncode == 1 and "holds predictions of another run (samples 2 there and 3 here)" in refused.stderr


def test_the_cards_world_by_cards_and_carries(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate.verifier, "is_correct", lambda response, gold: int(gold) % 2 == 0)
    evaluate.main(EvaluateConfig(limit=40, samples=1, out=str(tmp_path), max_new_tokens=3, device="cpu"))
    hands = cards.hands("held_out")[:40]
    text = (tmp_path / "table.md").read_text()
    assert f"cards: {100 * sum(h.total % 2 == 0 for h in hands) / 40:.1f} ± " in text and " % of 40 hands" in text
    for fact, of in (("cards", lambda h: len(h.digits)), ("carries", lambda h: h.carries)):
        counts = {n: [h.total % 2 == 0 for h in hands if of(h) == n] for n in sorted({of(h) for h in hands})}
        assert f"| {fact} | " + " | ".join(map(str, counts)) + " |" in text
        assert "| hands | " + " | ".join(str(len(some)) for some in counts.values()) + " |" in text
        for some in counts.values():
            assert f"{100 * statistics.fmean(some):.1f} ± " in text
    assert (tmp_path / "cards.png").stat().st_size > 5000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"benchmarks": "mmstar,mmmu"}, "no benchmark is called 'mmmu'; known are cards, mmmu_pro"),
        ({"samples": 0}, "--samples 0"),
        ({"benchmarks": ","}, "--benchmarks ,: names none"),
        ({"limit": -1}, "--limit -1"),
        ({"temperature": 0.0}, "--temperature 0.0"),
    ],
)
def test_bad_flags(flags, message):
    with pytest.raises(UsageError, match=message):
        EvaluateConfig(**flags).check()


def test_what_cannot_be_had_is_one_line_that_names_the_benchmark(command, tmp_path):
    words = ["evaluate.py", "--benchmarks", "mathverse", "--out", tmp_path / "out"]
    done = command(*words, check=False)  # no hub is reachable in tests
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert (
        "error: --benchmarks mathverse: MathVerse, split testmini, cannot be had from the hub, CaraJ/MathVerse-lmmseval"
        in done.stderr
    )
    with pytest.raises(UsageError, match="--predictions .*nothing.jsonl: no such file"):
        evaluate.main(EvaluateConfig(predictions=str(tmp_path / "nothing.jsonl"), out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
