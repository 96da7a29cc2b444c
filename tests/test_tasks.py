"""Prompts from data files, through `datasets` itself. The presets' files have the columns and types of the published ones."""

import io
import json
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Features, List, Value
from PIL import Image

import tasks
from tasks import UsageError, load_prompts

RED, BLUE = Image.new("RGB", (40, 36), "red"), Image.new("RGBA", (64, 70), "blue")
TEXT, NUMBER, PICTURE = Value("string"), Value("float64"), datasets.Image()


def write(path: Path, features: dict, rows: list[tuple]) -> str:
    """A parquet file; each row has the values of `features` in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = {name: [row[place] for row in rows] for place, name in enumerate(features)}
    datasets.Dataset.from_dict(columns, features=Features(features)).to_parquet(path)
    return str(path)


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
    features = {"images": List(PICTURE), "problem": TEXT, "answer": TEXT}
    return write(tmp_path_factory.mktemp("data") / "geometry.parquet", features, rows)


def test_images_stand_where_the_text_mentions_them(geometry):
    train, held_out = load_prompts(geometry, eval_prompts=1)
    assert (len(train), len(held_out)) == (4, 1)
    shapes = [[part.get("text", "<image>") for part in train[row].messages[0]["content"][:-1]] for row in range(4)]
    assert shapes == [
        ["<image>", "Find x."],
        ["From", "<image>", "and", "<image>", ", find y."],
        ["What is 2 + 3?"],
        ["<image>", "No mark: find z."],
    ]
    assert [[image.size for image in prompt.images] for prompt in train] == [[(40, 36)], [(40, 36), (64, 70)], [], [(64, 70)]]
    assert train[1].images[1].mode == "RGB"
    assert train[0].messages[0]["content"][-1]["text"].endswith("\\boxed{}.")
    assert (train[3].gold, held_out[0].gold) == ("6", "7")
    assert train.dropped == held_out.dropped == {}


def test_ids_are_stable_and_name_the_data(geometry):
    one, two = load_prompts(geometry, eval_prompts=1)[0], load_prompts(geometry, eval_prompts=1)[0]
    assert one[2].id == two[2].id == f"{one.fingerprint}:2"
    assert one.fingerprint != load_prompts(geometry, eval_prompts=2)[0].fingerprint


def test_a_batch_with_two_images_one_and_none_is_the_same_as_its_prompts_alone(geometry, base):
    train, _ = load_prompts(geometry, eval_prompts=1)
    rows = [(base.encode(train[row]), [7 + row, 11]) for row in (1, 2, 3)]
    with torch.no_grad():
        together, _ = base.logprobs(rows, 1.0)
        alone = torch.cat([base.logprobs([row], 1.0)[0] for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Presets
# ---------------------------------------------------------------------------------------------------------------------


def geometry3k(folder: Path) -> None:
    features = {"images": List(PICTURE), "problem": TEXT, "answer": TEXT}
    write(folder / "data/train-00000-of-00001.parquet", features, [([RED], f"<image>Find ${n}$.", f"{n}") for n in (3, 4)])
    write(folder / "data/test-00000-of-00001.parquet", features, [([RED], "<image>Test.", "9")])


def mmfinereason(folder: Path) -> None:
    rows = [
        {"problem_id": 1, "problem": "<image>How long?", "answer": "65.12", "images": ["MMFineReason_images/a.png"]},
        {"problem_id": 2, "problem": "<image>Which?\nA. 1\nB. 2", "answer": None, "images": ["MMFineReason_images/a.png"]},
        {"problem_id": 3, "problem": "<image>Is <image> it?", "answer": "B", "images": ["MMFineReason_images/b.png"] * 2},
        {"problem_id": 4, "problem": "<image>?", "answer": "Yes", "images": ["MMFineReason_images/gone.png"]},
    ]
    (folder / "MMFineReason_images").mkdir()
    RED.save(folder / "MMFineReason_images/a.png")
    BLUE.save(folder / "MMFineReason_images/b.png")
    lines = [row | {"problem_type": "math", "data_type": "image"} for row in rows + rows[:1]]
    (folder / "MMFineReason_data_with_conclusion.json").write_text(json.dumps(lines))


def mmfinereason_sft(folder: Path) -> None:
    features = {"source": TEXT, "id": TEXT, "original_answer": TEXT, "image": PICTURE, "question": TEXT, "answer": TEXT}
    rows = [("MMR1", "1", "long", BLUE, "<image>Area?", "(5,9)"), ("BMMR", "2", "", RED, "<image>?", "D")]
    empty = ("", "3", "", RED, "?", None)
    write(folder / "data/train-00000-of-00001.parquet", features, [empty, *rows, rows[0]])


def virl39k(folder: Path) -> None:
    features = {"answer": TEXT, "PassRate_32BTrained": NUMBER, "PassRate_7BBase": NUMBER, "category": TEXT, "source": TEXT,
                "question": TEXT, "qid": TEXT, "image": List(TEXT)}  # fmt: skip
    asked = [
        ("\\boxed{17^\\circ}", "<image>\nAngle?", ["images/P-1-0.png"]),
        ("\\boxed{C}", "<image><image>\nWhich? (A) 1 (B) 2 (C) 3", ["images/P-2-0.jpg", "images/P-1-0.png"]),
        ("\\boxed{\\frac{1}{2}}", "A text alone.", []),
        ("\\boxed{17", "<image>Not closed.", ["images/P-1-0.png"]),
        ("\\boxed{1} or \\boxed{2}", "<image>Two.", ["images/P-1-0.png"]),
        ("\\boxed{8}", "<image>Last.", ["images/P-1-0.png"]),
    ]
    rows = [(answer, 0.5, -1.0, "(GradeSchool) Geometric", "MMK12", question, "q", image) for answer, question, image in asked]
    write(folder / "39Krelease.parquet", features, rows)
    (folder / "images").mkdir()
    RED.save(folder / "images/P-1-0.png")
    BLUE.convert("RGB").save(folder / "images/P-2-0.jpg")


def mmk12(folder: Path) -> None:
    features = {"id": TEXT, "question": TEXT, "answer": TEXT, "subject": TEXT, "image": PICTURE}
    rows = [("1", "Find the angle.", "$55^{\\circ}$", "math", BLUE), ("2", "How many?", "12", "math", None)]
    write(folder / "data/train-00000-of-00001.parquet", features, [*rows, rows[0]])


def dapo(folder: Path) -> None:
    chat = List({"content": TEXT, "role": TEXT})
    features = {"prompt": TEXT, "solution": TEXT, "data_source": TEXT, "source_prompt": chat, "ability": TEXT,
                "reward_model": {"ground_truth": TEXT, "style": TEXT}, "extra_info": {"index": TEXT}}  # fmt: skip
    tail = (
        "math_dapo",
        [{"content": "Solve …", "role": "user"}],
        "MATH",
        {"ground_truth": "", "style": "rule"},
        {"index": "0"},
    )
    for config, rows in (("en", [("What is 3 + 31?", "34"), ("And 5?", "-5")]), ("cn", [("几个?", "1"), ("?", "2")])):
        write(folder / config / "train-00000-of-00001.parquet", features, [row + tail for row in rows])
    configs = "".join(f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/train-*\n" for c in ("cn", "en"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")


@pytest.mark.parametrize(
    ("make", "golds", "sizes", "dropped"),
    [
        (geometry3k, ["3"], [[(40, 36)]], {}),
        (mmfinereason, ["65.12", "B"], [[(40, 36)], [(64, 70)] * 2],
         {"no verifiable gold": 1, "an image missing or unreadable": 1}),
        (mmfinereason_sft, ["(5,9)", "D"], [[(64, 70)], [(40, 36)]], {"no verifiable gold": 1}),
        (virl39k, ["17^\\circ", "C", "\\frac{1}{2}"], [[(40, 36)], [(64, 70), (40, 36)], []], {"no verifiable gold": 2}),
        (mmk12, ["$55^{\\circ}$", "12"], [[(64, 70)], []], {}),
        (dapo, ["34"], [[]], {}),
    ],
)  # fmt: skip
def test_presets_read_copies(tmp_path, make, golds, sizes, dropped):
    make(tmp_path)
    preset = tasks.PRESETS[make.__name__]
    train, _ = load_prompts(f"{make.__name__}={tmp_path}", eval_prompts=1)
    assert [prompt.gold for prompt in train] == golds
    assert [[image.size for image in prompt.images] for prompt in train] == sizes
    assert train.dropped == dropped
    assert train.fingerprint.startswith(preset.hub.split("/")[1])
    assert train.fingerprint == load_prompts(f"{preset.hub}={tmp_path}", eval_prompts=1)[0].fingerprint


def test_a_preset_has_splits_and_takes_other_columns(tmp_path):
    geometry3k(tmp_path)
    _, held_out = load_prompts(f"geometry3k={tmp_path}", eval_split="test")
    assert [prompt.gold for prompt in held_out] == ["9"]
    path = write(tmp_path / "other.parquet", {"question": TEXT, "key": TEXT, "image": PICTURE}, [("Find.", "1", RED)] * 2)
    train, _ = load_prompts(f"mmk12={path}", columns="answer=key", eval_prompts=1)
    assert (train[0].gold, len(train[0].images)) == ("1", 1)


def test_a_hub_id_means_its_preset():
    for name, preset in tasks.PRESETS.items():
        if not preset.file:
            assert tasks.locate(name) == tasks.locate(preset.hub) == (preset, preset.hub)
    assert tasks.locate("a=b.parquet") == (tasks.Preset("a=b.parquet"), "a=b.parquet")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("geometry3k", "--dataset hiyouga/geometry3k, split train: .*HF_HOME"),
        ("dapo", "--dataset open-r1/DAPO-Math-17k-Processed, split train: .*a copy"),
        ("TIGER-Lab/ViRL39K", "no file TIGER-Lab/ViRL39K.*hf download TIGER-Lab/ViRL39K.*--dataset TIGER-Lab/ViRL39K=DIR"),
        ("mmfinereason={tmp_path}", "no file {tmp_path}/MMFineReason_data_with_conclusion.json.*--dataset mmfinereason=DIR"),
    ],
)
def test_presets_that_cannot_be_reached(tmp_path, dataset, message):
    with pytest.raises(UsageError, match=message.format(tmp_path=tmp_path)) as error:
        load_prompts(dataset.format(tmp_path=tmp_path))
    assert "\n" not in str(error.value)


def test_images_that_were_not_unpacked(tmp_path):
    virl39k(tmp_path)
    for path in tmp_path.glob("images/*"):
        path.unlink()
    with pytest.raises(UsageError, match="2 dropped: an image missing or unreadable.*unpack them"):  # though one row needs none
        load_prompts(f"virl39k={tmp_path}", eval_prompts=1)


# ---------------------------------------------------------------------------------------------------------------------
# Rows that are left out
# ---------------------------------------------------------------------------------------------------------------------


def png(image: Image.Image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


ROWS = [  # question, answer, images, options, why it is left out
    ("First?", "1", [png(RED)], None, None),
    (None, "1", [], None, "no question"),
    ("  ", "1", [], None, "no question"),
    ("", "2", [png(RED)], None, None),  # all is in the picture
    ("Gold?", None, [], None, "no verifiable gold"),
    ("Gold?", " ", [], None, "no verifiable gold"),
    ("Gold?", "<answer></answer>", [], None, "no verifiable gold"),
    ("Gold?", "x" * 1001, [], None, "no verifiable gold"),
    ("Gold?", "x" * 1000, [], None, None),
    ("Which?", "C", [], ["red", "blue"], "no verifiable gold"),
    ("Which?", "green", [], ["red", "blue"], "no verifiable gold"),
    ("Which?", "\\boxed{blue}", [], ["red", "blue"], None),
    ("Which?", "A", [], ["red", None], "options are no list of texts"),
    ("<image> or <image>?", "3", [png(RED)], None, "more <image> marks than images"),
    ("Broken?", "4", [png(RED), {"bytes": b"no picture", "path": None}], None, "an image missing or unreadable"),
    ("Empty?", "4", [{"bytes": b"", "path": None}], None, "an image missing or unreadable"),
    ("Null?", "4", [None], None, "an image missing or unreadable"),
    ("Narrow?", "5", [png(Image.new("L", (3, 601)))], None, "an image over 200 times as long as wide"),
    ("Not too narrow?", "6", [png(Image.new("L", (600, 3)))], None, None),
    ("A question that is too long?", "7", [], None, "over 20 tokens"),
    ("Last?", "8", None, None, None),
]


@pytest.fixture
def mixed(tmp_path):
    features = {"problem": TEXT, "answer": TEXT, "images": List(PICTURE), "options": List(TEXT)}
    return write(tmp_path / "mixed.parquet", features, [row[:4] for row in ROWS] + [ROWS[0][:4]])


def test_every_reason_is_counted_and_ids_stay(mixed, monkeypatch):
    seen = []

    def length_of(messages, sizes):
        seen.append(sizes)
        return len(messages[0]["content"][-2].get("text", "")) + len(sizes)

    decoded = []
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", lambda image: decoded.append(image))
        patch.setattr("PIL.ImageFile.ImageFile.load", lambda image: decoded.append(image))
        options = {"columns": "choices=options", "eval_prompts": 1}
        train, held_out = load_prompts(mixed, **options, max_prompt_tokens=20, length_of=length_of)
    assert decoded == []
    reasons = [row[-1] for row in ROWS]
    assert train.dropped == {reason: reasons.count(reason) for reason in reasons if reason}
    kept = [place for place, reason in enumerate(reasons) if reason is None]
    assert [prompt.id for prompt in train] == [f"{train.fingerprint}:{row}" for row in kept]
    assert seen == [[(40, 36)], [(40, 36)], [], [], [(600, 3)], [], [], [(40, 36)]]
    assert train[3].gold == "blue" and train[-1].id == f"{train.fingerprint}:{len(ROWS) - 1}"
    assert (held_out.dropped, len(held_out), held_out[0].id) == ({}, 1, f"{held_out.fingerprint}:0")

    free, _ = load_prompts(mixed, **options)
    assert "over 20 tokens" not in free.dropped and len(free) == len(train) + 1
    assert free.fingerprint == train.fingerprint and free[3].id == train[3].id
    assert tasks.counts({"over 20 tokens": 12, "no question": 3}) == "12 dropped: over 20 tokens, 3 dropped: no question"


def test_held_out_rows_are_cut_off_first(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{n}?", "answer": "" if n in (1, 4) else f"{n}"}) + "\n" for n in range(6)))
    train, held_out = load_prompts(str(path), eval_prompts=3)
    assert ([prompt.gold for prompt in train], [prompt.gold for prompt in held_out]) == (["0", "2"], ["3", "5"])
    assert train.dropped == held_out.dropped == {"no verifiable gold": 1}


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        (7, "7"), (0.5, "0.5"), (" 7 ", " 7 "), ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"), ("so <answer> C </answer>", "C"),
        (None, None), (float("nan"), None), (["4"], None), ("\\boxed{}", None), ("\\boxed{1}, \\boxed{2}", None),
    ],
)  # fmt: skip
def test_gold_text(answer, gold):
    assert tasks.gold_text(answer) == gold


def test_broken_pixels_name_the_row(tmp_path):
    whole = png(Image.effect_noise((64, 64), 50))["bytes"]
    rows = [([{"bytes": whole[: len(whole) // 2], "path": None}], "Cut?", "1")] * 2
    path = write(tmp_path / "cut.parquet", {"images": List(PICTURE), "problem": TEXT, "answer": TEXT}, rows)
    train, _ = load_prompts(path, eval_prompts=1)
    with pytest.raises(UsageError, match="cut.parquet-[0-9a-f]{12}:0 cannot be read .*remove that row"):
        train[0]


def test_paths_of_images(tmp_path):
    """One path, many, none; from the data file's folder on, or absolute."""
    (tmp_path / "pictures").mkdir()
    RED.save(tmp_path / "pictures/red.png")
    BLUE.save(tmp_path / "blue.png")
    paths = ["pictures/red.png", ["pictures/red.png", str(tmp_path / "blue.png")], "", None, []]
    rows = [json.dumps({"problem": "?", "images": path, "answer": place}) for place, path in enumerate(paths)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows, rows[0]]))
    train, _ = load_prompts(str(tmp_path / "rows.jsonl"), eval_prompts=1)
    assert [[image.size for image in prompt.images] for prompt in train] == [[(40, 36)], [(40, 36), (64, 70)], [], [], []]
    assert [prompt.gold for prompt in train] == ["0", "1", "2", "3", "4"]


def test_columns_map_and_choices(tmp_path):
    path = tmp_path / "choice.jsonl"
    path.write_text('{"q": "Which?", "options": ["red", "blue"], "key": "B"}\n' * 3)
    train, _ = load_prompts(str(path), columns="prompt=q,answer=key,choices=options", eval_prompts=1)
    assert (train[0].gold, train[0].choices, train[0].images) == ("B", ["red", "blue"], [])


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("{geometry}", {"columns": "prompt=question"}, "no column 'question' for prompt; it has images, problem, answer"),
        ("{geometry}", {"columns": "images=pictures"}, "no column 'pictures' for images"),
        ("{geometry}", {"columns": "picture=images"}, "unknown picture; known are prompt"),
        ("virl39k={geometry}", {}, "no column 'question' for prompt"),
        ("{geometry}", {"columns": "images=answer"}, "4 dropped: an image missing or unreadable|3 dropped: an image missing"),
        ("{geometry}", {"eval_prompts": 5}, "would hold out all of them"),
        ("{geometry}", {"eval_split": "test"}, "--eval-split test: .*geometry.parquet is one file, without splits"),
        (
            "{geometry}",
            {"max_prompt_tokens": 8, "length_of": lambda *_: 9},
            "4 dropped: over 8 tokens; raise --max-prompt-tokens",
        ),
        ("{geometry}x.txt", {}, "cannot be loaded"),
        ("nobody/nothing", {}, "--dataset nobody/nothing"),
        (__file__, {}, "cannot read .py files"),
    ],
)
def test_bad_data_sets(geometry, dataset, options, message):
    with pytest.raises(UsageError, match=message):
        load_prompts(dataset.format(geometry=geometry), **{"eval_prompts": 1} | options)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ('{"problem": null, "answer": "1"}', "", "3 dropped: no question; prompts are texts"),
        ('{"problem": [{"role": "user"}], "answer": "1"}', "", "3 dropped: no question; prompts are texts"),
        ('{"problem": "?", "answer": ["1"]}', "", "3 dropped: no verifiable gold; golds are texts or numbers of up to 1000"),
        (
            '{"problem": "?", "images": ["a.png"], "answer": "1"}',
            "",
            "3 dropped: an image missing or unreadable; .*unpack them",
        ),
        ('{"problem": "?", "images": 5, "answer": "1"}', "", "3 dropped: an image missing or unreadable; images are pictures"),
        (
            '{"problem": "?", "options": "red, blue", "answer": "A"}',
            "choices=options",
            "3 dropped: options are no list of texts",
        ),
        (
            '{"problem": "<image><image>?", "answer": "1"}',
            "",
            "3 dropped: more <image> marks than images; name the images' column",
        ),
    ],
)
def test_columns_of_the_wrong_type(tmp_path, row, columns, message):
    path = tmp_path / "odd.jsonl"
    path.write_text(f"{row}\n" * 4)
    with pytest.raises(UsageError, match=message):
        load_prompts(str(path), columns=columns, eval_prompts=1)


def test_cards_are_prompts():
    train, held_out = load_prompts("cards", eval_prompts=10)
    assert (len(train), len(held_out)) == (2048, 10)
    assert train.fingerprint != held_out.fingerprint
    prompt = train[5]
    assert isinstance(prompt, tasks.Prompt) and prompt.gold == str(train.rows[5].total)
    assert prompt.images[0].size == (32 * len(train.rows[5].digits), 32)
