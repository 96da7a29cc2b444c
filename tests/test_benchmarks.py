"""Rows with each benchmark's real columns, through parquet and `datasets`: prompts, verdicts."""

import re

import datasets
import pytest
from PIL import Image

import verifier
from commands import benchmarks
from commands.benchmarks import BENCHMARKS, EIGHT, PAPER, lettered, we_math
from plumbing import Unusable, UsageError
from plumbing.rows import BOXED, compose


def picture(width: int) -> Image.Image:
    return Image.new("RGB", (width, 32), "#204060")


def row(not_read: str, **columns) -> dict:
    return dict.fromkeys(not_read.split(","), "not read") | columns


ONE = picture(32)
ANGLE = "Question: How wide is angle D?\nChoices:\nA:65°\nB:55°\nC:45°\nD:35°"
ROWS = {  # a row of each, with the columns of the data set on the hub
    "mmmu_pro": row(
        "id,explanation,img_type,topic_difficulty,subject",
        question="How long is <image 1> in <image 3>?",
        options="['3 cm', '5 cm', '7 cm', \"10'\"]",
        answer="B",
        **{f"image_{n}": picture(32 * n) if n < 4 else None for n in range(1, 8)},
    ),
    "mathvista": row(
        "pid,question,image,unit,precision,question_type,answer_type,metadata",
        query="Hint: Please answer with one decimal place.\nQuestion: How tall is it?",
        choices=None,
        answer="1.2",
        decoded_image=ONE,
    ),
    "mathvision": row(
        "id,image,solution,level,subject",
        question="How many squares?\n<image1>",
        options=[],
        answer="7",
        decoded_image=ONE,
    ),
    "zerobench": row(
        "question_id,question_images,image_attribution",
        question_text="What is the total?",
        question_answer="11.9",
        question_images_decoded=[ONE, picture(64)],
    ),
    "wemath": row(
        "split,question number,knowledge concept,knowledge concept description",
        question="How large is it?",
        option="A. 4; B. 4.5 cm; C. 5; D. none of these",
        answer="B",
        image_path=ONE,
        key="2steps_1",
        ID="31",
    ),
    "mmbench": row(
        "category,source,L2-category,comment,split",
        index=7,
        hint="nan",
        question="What is it?",
        **{"A": "a cat", "B": "a dog", "C": "a fox", "D": "nan"},
        answer="C",
        image=ONE,
    ),
    "mmstar": row(
        "index,category,l2_category,meta_info",
        question="Which colour?\nOptions: A: dark red, B: green, C: light blue, D: none of them",
        answer="B",
        image=ONE,
    ),
    "mathverse": row(
        "sample_index,problem_index,problem_version,question,metadata,query_wo,question_for_eval",
        query_cot=f"Give the letter, e.g., A, B, C, D.\n{ANGLE}",
        question_type="multi-choice",
        answer="B",
        image=ONE,
    ),
}
CHOICE = {"choices": ["145°", "72°", "35°"], "answer": "72°"}
FREE = {"question_type": "free-form", "answer": "12", "query_cot": "Question: How long is (A) B?"}
VISION_ONLY = {"query_cot": "The question is in the image."}  # and so are the options


def load(folder, name: str, rows: list[dict]) -> list[benchmarks.Item]:
    """Writes rows that differ from the one above as a parquet file, and loads them again."""
    table = datasets.Dataset.from_list([ROWS[name] | row for row in rows])
    for column, value in ROWS[name].items():
        if isinstance(value, Image.Image) or name == "mmmu_pro" and column.startswith("image_"):
            table = table.cast_column(column, datasets.Image())
        if column == "choices":
            table = table.cast_column(column, datasets.List(datasets.Value("string")))
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"{name}.parquet")
    return benchmarks.items_of(name, str(folder))


GOLDEN = {  # changes of the row above, an answer, is it right; or why the row is not asked, None
    "mmmu_pro": [
        ({}, r"so \boxed{B}", True),
        ({}, r"\boxed{5 cm}", True),
        ({}, r"\boxed{B. 7 cm}", False),  # letter and text disagree
        ({}, "B", False),  # no box: no answer
        ({"answer": "D"}, r"\boxed{10'}", True),  # a quote in the list of options
        ({"options": str(list("abcdefghij")), "answer": "J"}, r"\boxed{J}", True),
        ({"options": "3 cm, 5 cm"}, "its options cannot be read", None),
        ({"options": "[['A', 'B']]"}, "its options cannot be read", None),  # row 81 of the data
        ({"answer": "E"}, "gold 'E' names none of its 4 options", None),
        ({"image_3": None}, "more <image> marks than images", None),
    ],
    "mathvista": [
        ({}, r"\boxed{1.2}", True),
        ({}, r"\boxed{\frac{6}{5}}", True),
        ({}, r"\boxed{1.24}", False),  # the official script rounds
        ({"answer": "14"}, r"\boxed{14 \text{ years}}", True),
        (CHOICE, r"\boxed{B}", True),
        (CHOICE, r"\boxed{72°}", True),
        (CHOICE, r"\boxed{A}", False),
        (CHOICE | {"answer": "90°"}, "gold '90°' names none of its 3 options", None),
    ],
    "mathvision": [
        ({}, r"\boxed{7.0}", True),
        ({}, r"\boxed{8}", False),
        ({"answer": r"2\sqrt{3}"}, r"\boxed{\sqrt{12}}", True),
        ({"options": list("ABCDE"), "answer": "D"}, r"\boxed{D}", True),  # they are in the picture
        ({"options": list("ABCDE"), "answer": "D"}, r"\boxed{E}", False),
        ({"options": ["3", "4", "9"], "answer": "C"}, r"\boxed{9}", True),
        ({"answer": " "}, "no question or no gold answer", None),
        ({"options": ["3", "", "9"], "answer": "C"}, "its options cannot be read", None),
        ({"decoded_image": picture(6432)}, "an image over 200 times as long as wide", None),
    ],
    "zerobench": [
        ({}, r"\boxed{11.90}", True),
        ({}, r"\boxed{11.8}", False),
        ({"question_answer": "Yellow"}, r"\boxed{\text{yellow}}", True),
        ({"question_answer": "5"}, r"\boxed{15}", False),  # officially right: it contains the gold
        ({"question_answer": "(3, 4)"}, r"\boxed{(4,3)}", False),
        ({"question_images_decoded": []}, "an image is missing", None),
    ],
    "wemath": [
        ({}, r"\boxed{b}", True),
        ({}, r"\boxed{4.5 cm}", True),
        ({}, r"\boxed{5}", False),
        ({"answer": "D"}, r"\boxed{D. none of these}", True),
        ({"option": "A. 1:2; B. 1:4; C. 4:1"}, r"\boxed{1:4}", True),
        ({"option": "A. ①; B．②; C. ③"}, r"\boxed{②}", True),  # a full-width stop, as in row 58
        ({"option": "four or five"}, "its options cannot be read", None),
        ({"answer": None}, "no question or no gold answer", None),
    ],
    "mmbench": [
        ({}, r"\boxed{A fox}", True),
        ({}, r"\boxed{B}", False),
        ({}, r"\boxed{D}", False),  # there is no fourth option
        ({"D": "a hen", "answer": "D"}, r"\boxed{a hen}", True),
        ({"C": None, "answer": "A"}, r"\boxed{(A)}", True),
        ({"B": "nan", "C": "nan"}, "its options cannot be read", None),
        ({"image": None}, "an image is missing", None),
    ],
    "mmstar": [
        ({}, r"\boxed{B: green}", True),
        ({}, r"\boxed{light blue}", False),
        ({"question": "How many?\nChoices:\n(A) 3\n(B) 4\n(C) 5"}, r"\boxed{4}", True),
        ({"question": "Is A: or B: right?\nOptions: A: yes, B: no"}, r"\boxed{no}", True),
        ({"question": ""}, "no question or no gold answer", None),
    ],
    "mathverse": [
        ({}, r"\boxed{B:55°}", True),
        ({}, r"\boxed{35°}", False),
        (VISION_ONLY, r"\boxed{B}", True),  # the options stand in the picture
        (VISION_ONLY, r"\boxed{D}", False),
        (FREE, r"\boxed{12 \text{ cm}}", True),
        (FREE, r"\boxed{A}", False),  # no option, although its text has an (A)
        (FREE | {"answer": r"\sqrt{8}"}, r"\boxed{2\sqrt{2}}", True),
        (FREE | {"answer": r"Area $=9 \pi \mathrm{cm}^{2}$"}, r"\boxed{9\pi}", True),
        ({"answer": "C\nD"}, "gold 'C\\nD' names none of its 4 options", None),
    ],
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_golden_answers(name, tmp_path):
    items = load(tmp_path, name, [changes for changes, *_ in GOLDEN[name]])
    of_rows = {int(item.id.split(":")[1]): item for item in reversed(items)}  # the first rotation
    for number, (changes, response, right) in enumerate(GOLDEN[name]):
        if right is None:
            with pytest.raises(Unusable, match=f"^{re.escape(response)}$"):
                of_rows[number].prompt()
        else:
            prompt = of_rows[number].prompt()
            verdict = verifier.is_correct(response, prompt.gold, prompt.choices)
            assert verdict is right, (changes, response)


def test_an_image_that_cannot_be_read_is_one_of_them(tmp_path):
    table = datasets.Dataset.from_list([ROWS["mmstar"]])
    stored = [{"bytes": b"no picture", "path": None}]
    kind = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    table = table.remove_columns("image").add_column("image", stored, feature=kind)
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "mmstar.parquet")
    (item,) = benchmarks.items_of("mmstar", str(tmp_path))
    with pytest.raises(Unusable, match="an image missing or unreadable"):
        item.prompt()


PROMPTS = {  # what the model is asked; [32] is an image of that width
    "mmmu_pro": "[64] How long is [32] in [96] ?\nOptions:\nA. 3 cm\nB. 5 cm\nC. 7 cm\nD. 10'",
    "mathvista": f"[32] {ROWS['mathvista']['query']}",
    "mathvision": "[32] How many squares?\n<image1>",
    "zerobench": "[32] [64] What is the total?",
    "wemath": "[32] How large is it?\nA. 4; B. 4.5 cm; C. 5; D. none of these",
    "mmbench": "[32] It barks.\nWhat is it?\nOptions:\nA. a cat\nB. a dog\nC. a fox",
    "mmstar": f"[32] {ROWS['mmstar']['question']}",
    "mathverse": f"[32] Give the letter, e.g., A, B, C, D.\n{ANGLE}",
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts(name, tmp_path):
    prompt = load(tmp_path, name, [{"hint": "It barks."} if name == "mmbench" else {}])[0].prompt()
    (message,), images = prompt.messages, iter(prompt.images)
    *parts, last = [
        f"[{next(images).width}]" if part["type"] == "image" else part["text"]
        for part in message["content"]
    ]
    assert " ".join(parts) == PROMPTS[name] and last == f"\n{BOXED}"
    assert next(images, None) is None


def test_mmbench_is_asked_in_every_rotation(tmp_path):
    rows = [{"index": 9, "C": None, "answer": "A"}, {}, {"index": 1_000_007, "A": "a dog"}]
    items = load(tmp_path, "mmbench", rows)  # the last row is a rotation that the data set holds
    units = [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1"), ("1", "2")]
    assert [(item.unit, item.part) for item in items] == units
    prompts = [item.prompt() for item in items]
    assert len({prompt.id for prompt in prompts}) == 5
    assert [(prompt.choices, prompt.gold) for prompt in prompts] == [
        (["a cat", "a dog"], "A"),
        (["a dog", "a cat"], "B"),
        (["a cat", "a dog", "a fox"], "C"),
        (["a dog", "a fox", "a cat"], "B"),
        (["a fox", "a cat", "a dog"], "A"),
    ]
    assert "A. a fox\nB. a cat\nC. a dog" in prompts[4].messages[0]["content"][1]["text"]


def test_images_stand_where_they_are_mentioned_also_twice():
    images = [picture(1), None, picture(3), picture(4)]
    content, order = compose("<image 3> before <image1>, again <image 3>", images, placed=True)
    assert [image.width for image in order] == [4, 3, 1, 3]  # the one not mentioned comes first
    texts = [part.get("text", "*") for part in content]
    assert texts == ["*", "*", "before", "*", ", again", "*"]
    content, order = compose("<image 2> then <image 1>", images[2:], placed=False)
    assert [image.width for image in order] == [3, 4]  # labels inside the pictures, say
    assert content[-1]["text"] == "<image 2> then <image 1>"
    for text in ("<image 2>", "<image 9>"):
        with pytest.raises(Unusable, match="more <image> marks than images"):
            compose(text, images, placed=True)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("A. 4; B. 4.5; C. 5", ["4", "4.5", "5"]),
        ("Which?\nOptions: A: a b, B: c, C: d e", ["a b", "c", "d e"]),
        ("Choices:\n(A) 3\n(B) 4", ["3", "4"]),
        ("Where?\nOptions: A: Paris, France, B: Rome, Italy", ["Paris, France", "Rome, Italy"]),
        ("A) x B) y C) z", ["x", "y", "z"]),
        ("A. B and C; B. A and C", ["B and C", "A and C"]),
        ("no options here", []),
        ("B. only", []),
        (None, []),
    ],
)
def test_lettered_options(text, options):
    assert lettered(text) == options


@pytest.mark.parametrize(
    ("steps", "whole", "strict"),
    [
        ([True, True], True, 1.0),  # complete mastery
        ([True, True], False, 0.5),  # inadequate generalisation
        ([True, False], True, 0.0),  # rote memorisation; 1 in the loose score
        ([False, True], False, 0.0),  # insufficient knowledge
        ([True, True, False], True, 0.0),
        ([True, True, True], False, 0.5),
    ],
)
def test_we_math_is_strict(steps, whole, strict):
    parts = {f"{len(steps)}steps_{n}": right for n, right in enumerate(steps, 1)}
    parts[f"{len(steps)}steps_multi"] = whole
    assert we_math(parts) == strict
    assert we_math(dict(list(parts.items())[1:])) is None  # a step is missing
    assert we_math(dict(list(parts.items())[:-1])) is None  # the whole is missing


def test_the_papers_rows_and_their_averages():
    """Of one row the printed average, 62.84, is not that of its eight numbers, 62.79."""
    off = {
        name: round(sum(eight) / 8 - average, 3)
        for name, (*eight, average) in PAPER.items()
        if abs(sum(eight) / 8 - average) > 0.0051
    }
    assert off == {"NPO early + late": -0.055} and len(EIGHT) == 8


def test_another_data_set_in_a_benchmarks_place(tmp_path):
    load(tmp_path, "mmstar", [{}])
    (tmp_path / "mmstar.parquet").rename(tmp_path / "wemath.parquet")
    with pytest.raises(UsageError, match="--benchmarks wemath: its rows have no 'image_path'; is"):
        benchmarks.items_of("wemath", str(tmp_path))
    (tmp_path / "wemath.parquet").rename(tmp_path / "mmbench.parquet")
    with pytest.raises(UsageError, match=r"have no 'hint'; is this lmms-lab/MMBench\? It has "):
        benchmarks.items_of("mmbench", str(tmp_path))
    paths = datasets.Dataset.from_list([ROWS["mmstar"] | {"image": "images/1.jpg"}])
    paths.to_parquet(tmp_path / "mmstar.parquet")
    with pytest.raises(UsageError, match="mmstar: its rows have no 'pictures in image'"):
        benchmarks.items_of("mmstar", str(tmp_path))
    with pytest.raises(UsageError, match="mathverse: .*neither mathverse.parquet nor a folder"):
        benchmarks.items_of("mathverse", str(tmp_path))


def test_a_copy_of_the_hubs_repository(tmp_path):
    """Its README tells configurations and splits; only the ones of the table are read."""
    folder = tmp_path / "mmbench"
    for config in ("cn", "en"):
        for split in ("dev", "test"):
            load(folder / config, "mmbench", [{"question": f"{config} {split}?"}])
            file = folder / config / "mmbench.parquet"
            file.rename(file.with_name(f"{split}-00000-of-00001.parquet"))
    configs = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in ("dev", "test"))
        for config in ("cn", "en")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    items = benchmarks.items_of("mmbench", str(tmp_path))
    texts = [item.prompt().messages[0]["content"][1]["text"] for item in items]
    assert len(texts) == 3 and all(text.startswith("en dev?\nOptions:") for text in texts)
    (tmp_path / "mmstar.parquet").write_bytes(b"no parquet")
    with pytest.raises(UsageError, match="MMStar, split val, cannot be loaded from --data-dir"):
        benchmarks.items_of("mmstar", str(tmp_path))
