"""Prompts from data files, through `datasets` itself, in the schemas of six published data sets."""

import io
import json
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Features, List, Value
from PIL import Image

from plumbing import UsageError, data
from plumbing.data import PromptSet
from plumbing.rollout import Prompt
from plumbing.settings import RunConfig
from worlds import cards, staircase

RED, BLUE = Image.new("RGB", (40, 36), "red"), Image.new("RGBA", (64, 70), "blue")
TEXT, NUMBER, PICTURE = Value("string"), Value("float64"), datasets.Image()
GEOMETRY = {"images": List(PICTURE), "problem": TEXT, "answer": TEXT}
IMAGE_GONE, NO_GOLD = "an image missing or unreadable", "no verifiable gold"


def write(path: Path, features: dict, rows: list[tuple]) -> str:
    """A parquet file; each row has the values of `features` in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[place] for row in rows] for place, name in enumerate(features)}
    datasets.Dataset.from_dict(columns, features=Features(features)).to_parquet(path)
    return str(path)


def write_lines(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(dataset, columns: str = "", eval_prompts: int = 1, **more) -> tuple[PromptSet, PromptSet]:
    flags = {"dataset": str(dataset), "columns": columns, "eval_prompts": eval_prompts}
    return data.load_prompts(RunConfig(**flags | more))


def sizes(prompts: PromptSet) -> list[list[tuple[int, int]]]:
    return [[image.size for image in prompt.images] for prompt in prompts]


def golds(prompts: PromptSet) -> list[str]:
    return [prompt.gold for prompt in prompts]


@pytest.fixture(scope="module")
def geometry(tmp_path_factory):
    """A parquet file in geometry3k's schema: one image, two images, none."""
    rows = [
        ([RED], "<image>Find x.", "3"),
        ([RED, BLUE], "From <image> and <image>, find y.", "4"),
        ([], "What is 2 + 3?", "5"),
        ([BLUE], "No mark: find z.", "6"),
        ([RED], "<image> Last.", "7"),
    ]
    return write(tmp_path_factory.mktemp("data") / "geometry.parquet", GEOMETRY, rows)


def test_images_stand_where_the_text_mentions_them(geometry):
    train, held_out = load(geometry)
    assert (len(train), len(held_out)) == (4, 1)
    contents = [prompt.messages[0]["content"] for prompt in train]
    assert [[part.get("text", "<image>") for part in content[:-1]] for content in contents] == [
        ["<image>", "Find x."],
        ["From", "<image>", "and", "<image>", ", find y."],
        ["What is 2 + 3?"],
        ["<image>", "No mark: find z."],
    ]
    assert all(content[-1]["text"].endswith("\\boxed{}.") for content in contents)
    assert sizes(train) == [[(40, 36)], [(40, 36), (64, 70)], [], [(64, 70)]]
    assert train[1].images[1].mode == "RGB"
    assert (train[3].gold, held_out[0].gold) == ("6", "7")
    assert train.dropped == held_out.dropped == {}


def test_ids_are_stable_and_name_the_data(geometry):
    one, _ = load(geometry)
    data._load_prompts.cache_clear()
    two, _ = load(geometry)
    assert one is not two and one[2].id == two[2].id == f"{one.fingerprint}:2"
    assert one.fingerprint != load(geometry, eval_prompts=2)[0].fingerprint


def test_a_mixed_batch_is_the_same_as_its_prompts_alone(geometry, base):
    """Two images, one, and none."""
    train, _ = load(geometry)
    rows = [(base.encode(train[row]), [7 + row, 11]) for row in (1, 2, 3)]
    with torch.no_grad():
        together, _ = base.logprobs(rows, 1.0)
        alone = torch.cat([base.logprobs([row], 1.0)[0] for row in rows])
    torch.testing.assert_close(together, alone, atol=3e-5, rtol=0)


def test_cards_are_prompts():
    train, held_out = load("cards", eval_prompts=10)
    assert (len(train), len(held_out)) == (2048, 10)
    assert train.fingerprint != held_out.fingerprint
    hand, prompt = cards.hands("train")[5], train[5]
    assert isinstance(prompt, Prompt) and prompt.id == f"{train.fingerprint}:5"
    assert hand == cards.Hand(18, (7, 4, 9, 3, 1, 7, 6)) and train.parts == ()
    working = "18 +7= 25 +4= 29 +9= 38 +3= 41 +1= 42 +7= 49 +6= 55"
    assert (prompt.gold, prompt.working) == (working, None)
    assert prompt.images[0].size == (32 * 7, 32)
    assert RunConfig().dataset == "cards" and RunConfig(model="x").dataset == "hiyouga/geometry3k"


def test_the_lax_cards_are_the_same_prompts_with_the_total_as_gold():
    (lax, _), (strict, _) = load("cards_lax", eval_prompts=10), load("cards", eval_prompts=10)
    assert (lax[5].gold, lax[5].working) == ("55", strict[5].gold)
    assert lax[5].messages == strict[5].messages
    assert lax[5].images[0].tobytes() == strict[5].images[0].tobytes()
    assert lax.fingerprint != strict.fingerprint  # their guide caches may not be mixed up
    assert RunConfig(model="cards_lax").dataset == "cards_lax"


def test_the_staircase_is_prompts_of_two_parts():
    train, held_out = load("staircase", eval_prompts=7, model="staircase")
    assert (len(train), len(held_out)) == (2048, 7)
    assert held_out.parts == ("a", "b", "a", "b", "a", "b", "a") and len(train.parts) == 2048
    hand, prompt = staircase.hands("train", 2)[5], train[5]
    assert (hand.borrows, train.parts[5]) == (2, "b")
    assert (prompt.gold, prompt.working) == (hand.working, None)
    assert prompt.gold.count("borrow ") == 2
    assert prompt.messages == staircase.messages(hand) and prompt.images[0].size == (128, 32)
    one, _ = load("staircase", model="staircase", borrows=1)
    assert one[5].gold.count("borrow ") == 1 and one.fingerprint != train.fingerprint


# ---------------------------------------------------------------------- published data sets


def geometry3k(folder: Path) -> None:
    rows = [([RED], f"<image>Find ${n}$.", f"{n}") for n in (3, 4)]
    write(folder / "data/train-00000-of-00001.parquet", GEOMETRY, rows)
    test = [([RED], "<image>Test.", "9")]
    write(folder / "data/test-00000-of-00001.parquet", GEOMETRY, test)


def mmfinereason(folder: Path) -> None:
    pictures = folder / "MMFineReason_images"
    pictures.mkdir()
    RED.save(pictures / "a.png")
    BLUE.save(pictures / "b.png")
    a, b, gone = (f"MMFineReason_images/{name}.png" for name in ("a", "b", "gone"))
    rows = [
        ("<image>How long?", "65.12", [a]),
        ("<image>Which?\nA. 1\nB. 2", None, [a]),
        ("<image>Is <image> it?", "B", [b, b]),
        ("<image>?", "Yes", [gone]),
    ]
    lines = [dict(zip(("problem", "answer", "images"), row)) for row in [*rows, rows[0]]]
    (folder / "MMFineReason_data_with_conclusion.json").write_text(json.dumps(lines))


def mmfinereason_sft(folder: Path) -> None:
    features = {"original_answer": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT}
    first = ("long", BLUE, "<image>Area?", "(5,9)")
    rows = [("", RED, "?", None), first, ("", RED, "<image>?", "D"), first]
    write(folder / "data/train-00000-of-00001.parquet", features, rows)


def virl39k(folder: Path) -> None:
    features = {"answer": TEXT, "PassRate_7BBase": NUMBER, "question": TEXT, "image": List(TEXT)}
    red, blue = "images/P-1-0.png", "images/P-2-0.jpg"
    rows = [
        ("\\boxed{17^\\circ}", -1.0, "<image>\nAngle?", [red]),
        ("\\boxed{C}", 0.5, "<image><image>\nWhich? (A) 1 (B) 2 (C) 3", [blue, red]),
        ("\\boxed{\\frac{1}{2}}", 0.5, "A text alone.", []),
        ("\\boxed{17", 0.5, "<image>Not closed.", [red]),
        ("\\boxed{1} or \\boxed{2}", 0.5, "<image>Two.", [red]),
        ("\\boxed{8}", 0.5, "<image>Last.", [red]),
    ]
    write(folder / "39Krelease.parquet", features, rows)
    (folder / "images").mkdir()
    RED.save(folder / red)
    BLUE.convert("RGB").save(folder / blue)


def mmk12(folder: Path) -> None:
    features = {"id": TEXT, "question": TEXT, "answer": TEXT, "subject": TEXT, "image": PICTURE}
    first = ("1", "Find the angle.", "$55^{\\circ}$", "math", BLUE)
    rows = [first, ("2", "How many?", "12", "math", None), first]
    write(folder / "data/train-00000-of-00001.parquet", features, rows)


def dapo(folder: Path) -> None:
    """Two configurations, of which the Chinese one comes first."""
    chat = List({"content": TEXT, "role": TEXT})
    features = {"prompt": TEXT, "solution": TEXT, "source_prompt": chat}
    texts = {"cn": [("几个?", "1"), ("?", "2")], "en": [("What is 3 + 31?", "34"), ("5?", "-5")]}
    configs = ""
    for config, rows in texts.items():
        rows = [(*row, [{"content": "Solve …", "role": "user"}]) for row in rows]
        write(folder / config / "train-00000-of-00001.parquet", features, rows)
        files = f"  data_files:\n  - split: train\n    path: {config}/train-*\n"
        configs += f"- config_name: {config}\n{files}"
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


SFT = "OpenDataArena/MMFineReason-SFT-123K-Qwen3-VL-235B-Thinking"
A_RED, A_BLUE = (40, 36), (64, 70)


@pytest.mark.parametrize(
    ("make", "dataset", "columns", "answers", "pictures", "dropped"),
    [
        (geometry3k, "hiyouga/geometry3k", "", ["3"], [[A_RED]], {}),
        (mmfinereason_sft, SFT, "", ["(5,9)", "D"], [[A_BLUE], [A_RED]], {NO_GOLD: 1}),
        (mmk12, "FanqingM/MMK12", "", ["$55^{\\circ}$", "12"], [[A_BLUE], []], {}),
        (dapo, "open-r1/DAPO-Math-17k-Processed", "", ["34"], [[]], {}),
        (
            mmfinereason,
            "MMFineReason/MMFineReason_data_with_conclusion.json",
            "",
            ["65.12", "B"],
            [[A_RED], [A_BLUE] * 2],
            {NO_GOLD: 1, IMAGE_GONE: 1},
        ),
        (
            virl39k,
            "ViRL39K/39Krelease.parquet",
            "prompt=question,images=image",
            ["17^\\circ", "C", "\\frac{1}{2}"],
            [[A_RED], [A_BLUE, A_RED], []],
            {NO_GOLD: 2},
        ),
    ],
)
def test_published_data_sets(
    tmp_path, monkeypatch, make, dataset, columns, answers, pictures, dropped
):
    """Four by the hub id (the hub's files lie in a folder of that name), two as local files."""
    folder = tmp_path / (Path(dataset).parent if Path(dataset).suffix else dataset)
    folder.mkdir(parents=True)
    make(folder)
    monkeypatch.chdir(tmp_path)
    train, _ = load(dataset, columns)
    assert (golds(train), sizes(train), train.dropped) == (answers, pictures, dropped)
    assert train.fingerprint.startswith(f"{Path(dataset).name}-")


def test_other_columns_than_the_hubs(tmp_path, monkeypatch):
    features = {"question": TEXT, "key": TEXT, "image": PICTURE}
    write(tmp_path / "FanqingM/MMK12/train.parquet", features, [("Find.", "1", RED)] * 2)
    monkeypatch.chdir(tmp_path)
    train, _ = load("FanqingM/MMK12", "answer=key")
    assert (golds(train), sizes(train)) == (["1"], [[A_RED]])


@pytest.mark.parametrize("dataset", ["hiyouga/geometry3k", "nobody/nothing"])
def test_hub_data_sets_that_cannot_be_reached(dataset):
    message = f"--dataset {dataset}: cannot be loaded .*HF_HOME"
    with pytest.raises(UsageError, match=message) as error:
        load(dataset)
    assert "\n" not in str(error.value)


def test_images_that_were_not_unpacked(tmp_path):
    virl39k(tmp_path)
    for path in tmp_path.glob("images/*"):
        path.unlink()
    with pytest.raises(UsageError, match=f"2 dropped: {IMAGE_GONE}.*unpack them"):
        load(tmp_path / "39Krelease.parquet", "prompt=question,images=image")


# ---------------------------------------------------------------------- rows that are dropped


def png(image: Image.Image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


NARROW, LONG = png(Image.new("L", (3, 601))), png(Image.new("L", (600, 3)))
NO_PICTURE, EMPTY = {"bytes": b"no picture", "path": None}, {"bytes": b"", "path": None}
ROWS = [  # question, answer, images, options, why it is dropped
    ("First?", "1", [png(RED)], None, None),
    (None, "1", [], None, "no question"),
    ("  ", "1", [], None, "no question"),
    ("", "2", [png(RED)], None, None),  # all is in the picture
    ("Gold?", None, [], None, NO_GOLD),
    ("Gold?", " ", [], None, NO_GOLD),
    ("Gold?", "<answer></answer>", [], None, NO_GOLD),
    ("Gold?", "x" * 1001, [], None, NO_GOLD),
    ("Gold?", "x" * 1000, [], None, None),
    ("Which?", "C", [], ["red", "blue"], NO_GOLD),
    ("Which?", "green", [], ["red", "blue"], NO_GOLD),
    ("Which?", "\\boxed{blue}", [], ["red", "blue"], None),
    ("Which?", "A", [], ["red", None], "options are no list of texts"),
    ("<image> or <image>?", "3", [png(RED)], None, "more <image> marks than images"),
    ("Broken?", "4", [png(RED), NO_PICTURE], None, IMAGE_GONE),
    ("Empty?", "4", [EMPTY], None, IMAGE_GONE),
    ("Null?", "4", [None], None, IMAGE_GONE),
    ("Narrow?", "5", [NARROW], None, "an image over 200 times as long as wide"),
    ("Not too narrow?", "6", [LONG], None, None),
    ("Seventeen?", "7", [png(RED)] * 17, None, "over 16 images"),
    ("A question that is too long?", "7", [], None, "over 20 tokens"),
    ("Last?", "8", None, None, None),
]


def test_every_reason_is_counted_and_ids_stay(tmp_path, monkeypatch):
    features = {"problem": TEXT, "answer": TEXT, "images": List(PICTURE), "options": List(TEXT)}
    rows = [row[:4] for row in [*ROWS, ROWS[0]]]
    path = write(tmp_path / "mixed.parquet", features, rows)
    measured, decoded = [], []

    def length(messages, sizes, *parts):
        measured.append(sizes)
        return len(messages[0]["content"][-2].get("text", "")) + len(sizes)

    with monkeypatch.context() as patch:
        patch.setattr(data, "prompt_length", length)
        patch.setattr(Image.Image, "load", decoded.append)
        patch.setattr("PIL.ImageFile.ImageFile.load", decoded.append)
        train, held_out = load(path, "choices=options", max_prompt_tokens=20)
    assert decoded == []
    reasons = [row[-1] for row in ROWS]
    assert train.dropped == {reason: reasons.count(reason) for reason in reasons if reason}
    kept = [place for place, reason in enumerate(reasons) if reason is None]
    assert [prompt.id for prompt in train] == [f"{train.fingerprint}:{row}" for row in kept]
    assert measured == [[A_RED], [A_RED], [], [], [(600, 3)], [], [], [A_RED]]
    assert (train[3].gold, train[3].choices) == ("blue", ["red", "blue"])
    assert (held_out.dropped, len(held_out)) == ({}, 1)
    assert held_out[0].id == f"{held_out.fingerprint}:0"
    free, _ = load(path, "choices=options", max_prompt_tokens=0)  # no limit
    assert "over 20 tokens" not in free.dropped and len(free) == len(train) + 1
    assert free.fingerprint == train.fingerprint and free[3].id == train[3].id
    shown = data.counts({"over 20 tokens": 12, "no question": 3})
    assert shown == "12 dropped: over 20 tokens, 3 dropped: no question"


def test_held_out_rows_are_cut_off_first(tmp_path):
    rows = [{"problem": f"{n}?", "answer": "" if n in (1, 4) else f"{n}"} for n in range(6)]
    train, held_out = load(write_lines(tmp_path / "rows.jsonl", rows), eval_prompts=3)
    assert (golds(train), golds(held_out)) == (["0", "2"], ["3", "5"])
    assert train.dropped == held_out.dropped == {NO_GOLD: 1}


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (7, "7"),
        (0.5, "0.5"),
        (" 7 ", " 7 "),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("so <answer> C </answer>", "C"),
        (None, None),
        (float("nan"), None),
        (["4"], None),
        ("\\boxed{}", None),
        ("\\boxed{1}, \\boxed{2}", None),
    ],
)
def test_gold_text(answer, gold):
    assert data.gold_text(answer) == gold


def test_broken_pixels_name_the_row(tmp_path):
    whole = png(Image.effect_noise((64, 64), 50))["bytes"]
    rows = [([{"bytes": whole[: len(whole) // 2], "path": None}], "Cut?", "1")] * 2
    train, _ = load(write(tmp_path / "cut.parquet", GEOMETRY, rows))
    message = "cut.parquet-[0-9a-f]{12}:0 cannot be read .*remove that row"
    with pytest.raises(UsageError, match=message):
        train[0]


def test_paths_of_images(tmp_path):
    """One path, many, none; absolute, or from the data file's folder."""
    (tmp_path / "pictures").mkdir()
    RED.save(tmp_path / "pictures/red.png")
    BLUE.save(tmp_path / "blue.png")
    two = ["pictures/red.png", str(tmp_path / "blue.png")]
    stored = ["pictures/red.png", two, "", None, []]
    rows = [{"problem": "?", "images": path, "answer": n} for n, path in enumerate(stored)]
    train, _ = load(write_lines(tmp_path / "rows.jsonl", [*rows, rows[0]]))
    assert sizes(train) == [[A_RED], [A_RED, A_BLUE], [], [], []]
    assert golds(train) == ["0", "1", "2", "3", "4"]


def test_columns_map_and_choices(tmp_path):
    rows = [{"q": "Which?", "options": ["red", "blue"], "key": "B"}] * 3
    path = write_lines(tmp_path / "choice.jsonl", rows)
    train, _ = load(path, "prompt=q,answer=key,choices=options")
    assert (train[0].gold, train[0].choices, train[0].images) == ("B", ["red", "blue"], [])


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("{geometry}", {"columns": "prompt=question"}, "no column 'question' .*; it has images"),
        ("{geometry}", {"columns": "images=pictures"}, "no column 'pictures' for images"),
        ("{geometry}", {"columns": "picture=images"}, "unknown picture; known are prompt"),
        ("{geometry}", {"columns": "images=answer"}, f"3 dropped: {IMAGE_GONE}"),
        ("{geometry}", {"eval_prompts": 5}, "would hold out all of them"),
        ("{geometry}", {"max_prompt_tokens": 8}, "4 dropped: over 8 tokens; raise --max-prompt"),
        ("{geometry}x.txt", {}, "cannot be loaded"),
        (__file__, {}, "cannot be read; only .parquet"),
    ],
)
def test_bad_data_sets(geometry, dataset, options, message):
    with pytest.raises(UsageError, match=message):
        load(dataset.format(geometry=geometry), **options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"problem": None}, "no question; prompts are texts"),
        ({"problem": [{"role": "user"}]}, "no question; prompts are texts"),
        ({"answer": ["1"]}, f"{NO_GOLD}; golds are texts or numbers of up to 1000"),
        ({"images": ["a.png"]}, f"{IMAGE_GONE}; .*unpack them"),
        ({"images": 5}, f"{IMAGE_GONE}; images are pictures"),
        ({"choices": "red, blue"}, "options are no list of texts; name another column"),
        ({"problem": "<image>?"}, "more <image> marks than images; name the images' column"),
        ({"problem": "<|image_pad|>?"}, "an image token in its text; remove marks such as"),
    ],
)
def test_columns_of_the_wrong_type(tmp_path, row, message):
    rows = [{"problem": "?", "answer": "1"} | row] * 4
    path = write_lines(tmp_path / "odd.jsonl", rows)
    with pytest.raises(UsageError, match=f"3 dropped: {message}"):
        load(path, "choices=choices" if "choices" in row else "")
