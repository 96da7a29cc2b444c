"""Each benchmark's rows in its real schema, through parquet and `datasets`: prompts, images, what is right, what is malformed."""

import datasets
import pytest
from PIL import Image

import evaluate
from benchmarks import BENCHMARKS, Malformed, compose, lettered, we_math
from tasks import BOXED, UsageError


def picture(width: int) -> Image.Image:
    return Image.new("RGB", (width, 32), "#204060")


ONE = picture(32)
ROWS = {  # a row of each, with the columns of the data set on the hub
    "mmmu_pro": dict(id="test_Art_1", question="How long is <image 1> in <image 3>?", options="['3 cm', '5 cm', '7 cm', \"10'\"]",
                     explanation="", **{f"image_{n}": picture(32 * n) if n in (1, 2, 3) else None for n in range(1, 8)},
                     img_type="['Paintings']", answer="B", topic_difficulty="Easy", subject="Art"),
    "mathvista": dict(pid="1", question="How tall is it?", image="images/1.jpg", decoded_image=ONE, choices=None, unit=None, precision=1.0,
                      answer="1.2", question_type="free_form", answer_type="float", metadata={"split": "testmini"},
                      query="Hint: Please answer with one decimal place.\nQuestion: How tall is it?"),
    "mathvision": dict(id="4", question="How many squares?\n<image1>", options=[], image="images/4.jpg", decoded_image=ONE, answer="7",
                       solution=None, level=3, subject="counting"),
    "zerobench": dict(question_id="2", question_text="What is the total?", question_images=["a.png", "b.png"], question_answer="11.9",
                      question_images_decoded=[ONE, picture(64)], image_attribution=""),
    "wemath": {"ID": "31", "split": "testmini", "knowledge concept": "Area", "question": "How large is it?",
               "option": "A. 4; B. 4.5 cm; C. 5; D. No correct answer", "answer": "B", "image_path": ONE, "key": "2steps_1",
               "question number": "1", "knowledge concept description": ""},
    "mmbench": {"index": 7, "question": "What is it?", "hint": "nan", "A": "a cat", "B": "a dog", "C": "a fox", "D": "nan", "answer": "C",
                "category": "object", "image": ONE, "source": "web", "L2-category": "perception", "comment": "nan", "split": "dev"},
    "mmstar": dict(index=0, question="Which colour?\nOptions: A: dark red, B: green, C: light blue, D: none of them", image=ONE, answer="B",
                   category="coarse perception", l2_category="image emotion", meta_info={"source": "MMBench", "split": "val"}),
    "mathverse": dict(sample_index="1", problem_index="1", problem_version="Text Dominant", question="How wide is angle D?", image=ONE,
                      answer="B", question_type="multi-choice", metadata={"split": "testmini"}, query_wo="", question_for_eval="",
                      query_cot="Please first reason, and give the option letter, e.g., A, B, C, D, at the end.\nQuestion: How wide is angle D?\n"
                                "Choices:\nA:65°\nB:55°\nC:45°\nD:35°"),
}  # fmt: skip
CHOICE = {
    "question_type": "multi_choice",
    "answer_type": "text",
    "choices": ["145°", "72°", "35°"],
    "answer": "72°",
    "precision": None,
}
INTEGER = {"answer_type": "integer", "answer": "14", "precision": None}
FREE = {"question_type": "free-form", "answer": "12 cm", "query_cot": "Please first reason.\nQuestion: How long is AB?"}


def load(folder, name: str, rows: list[dict]):
    """The rows, written as a parquet file and loaded again by evaluate.py."""
    table = datasets.Dataset.from_list([ROWS[name] | row for row in rows])
    for column, value in ROWS[name].items():
        if isinstance(value, Image.Image) or column.startswith("image_") and name == "mmmu_pro":
            table = table.cast_column(column, datasets.Image())
        if column == "choices":
            table = table.cast_column(column, datasets.List(datasets.Value("string")))
    folder.mkdir(parents=True, exist_ok=True)
    table.to_parquet(folder / f"{name}.parquet")
    return evaluate.rows_of(name, str(folder))


GOLDEN = {  # (what differs from the row above, an answer, whether it is right; or None, and why it cannot be asked)
    "mmmu_pro": [
        ({}, r"so \boxed{B}", True),
        ({}, r"\boxed{(B)}", True),
        ({}, r"\boxed{5 cm}", True),  # the option's text
        ({}, r"\boxed{B. 5 cm}", True),
        ({}, r"\boxed{B. 7 cm}", False),  # letter and text disagree
        ({}, r"\boxed{C}", False),
        ({}, "B", False),  # no box: no answer
        ({}, r"\boxed{A} or \boxed{B}", True),  # the last one counts
        ({}, r"\boxed{K}", False),
        ({"answer": "D"}, r"\boxed{10'}", True),  # a quote in the list of options
        ({"options": "['" + "', '".join("abcdefghij") + "']", "answer": "J"}, r"\boxed{J}", True),
        ({"options": "['" + "', '".join("abcdefghij") + "']", "answer": "J"}, r"\boxed{j}", True),
        ({"options": "3 cm, 5 cm"}, "its options are no list", None),
        ({"options": "['3 cm']"}, "its options cannot be read", None),
        ({"options": "[['A', 'B']]"}, "its options cannot be read", None),  # as row 81 of the real data
        ({"options": "5"}, "its options are no list", None),
        ({"answer": "E"}, "gold 'E' names none of its 4 options", None),
        ({"image_3": None}, "an image is missing", None),
    ],
    "mathvista": [
        ({}, r"\boxed{1.2}", True),
        ({}, r"\boxed{1.24}", True),  # rounded to one decimal
        ({}, r"\boxed{1.26}", False),
        ({"precision": 2.0, "answer": "1.24"}, r"\boxed{1.2}", False),
        ({"precision": 2.0, "answer": "1.20"}, r"\boxed{1.2}", True),
        (INTEGER, r"\boxed{14}", True),
        (INTEGER, r"\boxed{14.7}", True),  # cut, not rounded, as the official script does
        (INTEGER, r"\boxed{13.7}", False),
        (INTEGER | {"answer": "1400"}, r"\boxed{1,400}", True),
        (INTEGER | {"unit": "$"}, r"\boxed{\$14}", True),
        (INTEGER | {"unit": "years"}, r"\boxed{14 \text{ years}}", True),
        (INTEGER | {"unit": "years"}, r"\boxed{14 Years old}", True),
        (INTEGER | {"unit": "years"}, r"\boxed{14~\text{months}}", False),  # another unit than the one asked for
        (INTEGER | {"unit": "g"}, r"\boxed{14\,\mathrm{g}}", True),
        (INTEGER, r"\boxed{14 apples}", True),  # none was asked for
        (INTEGER, r"\boxed{14^\circ}", True),
        (INTEGER, r"\boxed{14 or 15}", False),
        (INTEGER, r"\boxed{14 + x}", False),
        (INTEGER, r"\boxed{14 \text{ m}^2}", True),
        (INTEGER, r"\boxed{\approx 14}", True),
        (INTEGER, r"\boxed{1" + "0" * 400 + "}", False),  # beyond a float
        (INTEGER, r"\boxed{14 \times 10^{99999}}", False),
        (INTEGER, r"\boxed{14/0}", False),
        (INTEGER, r"\boxed{\frac{" + "1" * 5000 + "}{2}}", False),
        (INTEGER | {"answer": "1400"}, r"\boxed{1{,}400}", True),
        (INTEGER | {"answer": "500"}, r"\boxed{5 \times 10^{2}}", True),
        ({"precision": 2.0, "answer": "0.67"}, r"\boxed{2/3}", True),
        ({"precision": 2.0, "answer": "0.67"}, r"\boxed{\frac{1}{3}}", False),
        (INTEGER | {"answer": "-3"}, r"\boxed{-3}", True),
        ({"answer": "0.5"}, r"\boxed{\frac{1}{2}}", True),
        ({"answer_type": "list", "answer": "[1, 2.5]"}, r"\boxed{[1.0, 2.5]}", True),
        ({"answer_type": "list", "answer": "[1, 2.5]"}, r"\boxed{[2.5, 1]}", False),
        ({"answer_type": "list", "answer": "[2007, 2008]"}, r"\boxed{2007 and 2008}", True),
        ({"answer_type": "list", "answer": "[2007, 2008]"}, r"\boxed{2007}", False),
        (CHOICE, r"\boxed{B}", True),
        (CHOICE, r"\boxed{72°}", True),
        (CHOICE, r"\boxed{A}", False),
        ({"answer": ""}, "no gold answer", None),
        (CHOICE | {"answer": "90°"}, "gold '90°' names none of its 3 options", None),
        ({"decoded_image": None}, "an image is missing", None),
    ],
    "mathvision": [
        ({}, r"\boxed{7}", True),
        ({}, r"\boxed{7.0}", True),
        ({}, r"\boxed{8}", False),
        ({}, r"there are 7", False),
        ({"answer": r"\frac{3}{4}"}, r"\boxed{0.75}", True),
        ({"answer": r"2\sqrt{3}"}, r"\boxed{\sqrt{12}}", True),
        ({"answer": r"2\sqrt{3}"}, r"\boxed{3\sqrt{2}}", False),
        ({"answer": "1000"}, r"\boxed{1,000}", True),
        ({"options": ["A", "B", "C", "D", "E"], "answer": "D"}, r"\boxed{D}", True),  # the options are in the picture
        ({"options": ["A", "B", "C", "D", "E"], "answer": "D"}, r"\boxed{E}", False),
        ({"options": ["3", "4", "9"], "answer": "C"}, r"\boxed{9}", True),
        ({"options": ["3", "4", "9"], "answer": "C"}, r"\boxed{C}", True),
        ({"options": ["3", "", "9"], "answer": "C"}, "its options cannot be read", None),
        ({"answer": " "}, "no gold answer", None),
        ({"question": "<image1> is to <image2> as ?"}, r"\boxed{7}", True),  # one picture holds both, labelled
        ({"decoded_image": None}, "an image is missing", None),
        ({"decoded_image": picture(32 * 201)}, "an image is over 200 times as long as wide", None),
    ],
    "zerobench": [
        ({}, r"\boxed{11.9}", True),
        ({}, r"\boxed{11.90}", True),
        ({}, r"\boxed{11.8}", False),
        ({}, "11.9", False),
        ({"question_answer": "Yellow"}, r"\boxed{yellow}", True),
        ({"question_answer": "Yellow"}, r"\boxed{\text{Yellow}.}", True),
        ({"question_answer": "Yellow"}, r"\boxed{yellowish}", False),
        ({"question_answer": "1,234"}, r"\boxed{1234}", True),
        ({"question_answer": "(3, 4)"}, r"\boxed{(3,4)}", True),
        ({"question_answer": "(3, 4)"}, r"\boxed{(4,3)}", False),
        ({"question_answer": "5"}, r"\boxed{15}", False),  # containment would call this right
        ({"question_answer": "-2"}, r"\boxed{-2}", True),
        ({"question_answer": ""}, "no gold answer", None),
        ({"question_images_decoded": []}, "an image is missing", None),
    ],
    "wemath": [
        ({}, r"\boxed{B}", True),
        ({}, r"\boxed{b}", True),
        ({}, r"\boxed{4.5 cm}", True),
        ({}, r"\boxed{A}", False),
        ({}, r"\boxed{5}", False),
        ({}, "The answer is B", False),
        ({"answer": "D"}, r"\boxed{No correct answer}", True),
        ({"answer": "D"}, r"\boxed{D. No correct answer}", True),
        ({"option": "A. 1:2; B. 1:4; C. 4:1", "answer": "B"}, r"\boxed{1:4}", True),
        ({"option": "A. 1:2; B. 1:4; C. 4:1", "answer": "B"}, r"\boxed{C}", False),
        ({"option": "A. 3; B. 4; C. 5; D. 6; E. No correct answer", "answer": "E"}, r"\boxed{E}", True),
        ({"option": "A. B and C; B. A and C; C. none", "answer": "C"}, r"\boxed{C}", True),
        ({"option": "A. ①; B．②; C. ③"}, r"\boxed{②}", True),  # a full-width stop, as in row 58
        ({"option": "four or five"}, "its options cannot be read", None),
        ({"answer": None}, "no gold answer", None),
        ({"image_path": None}, "an image is missing", None),
    ],
    "mmbench": [
        ({}, r"\boxed{C}", True),
        ({}, r"\boxed{a fox}", True),
        ({}, r"\boxed{C. a fox}", True),
        ({}, r"\boxed{B}", False),
        ({}, r"\boxed{D}", False),  # there is no fourth option
        ({}, "C", False),
        ({}, r"\boxed{A fox}", True),
        ({"D": "a hen", "answer": "D"}, r"\boxed{D}", True),
        ({"D": "a hen", "answer": "D"}, r"\boxed{a hen}", True),
        ({"C": None, "answer": "A"}, r"\boxed{A}", True),  # two options
        ({"C": None, "answer": "A"}, r"\boxed{C}", False),
        ({"hint": "It barks.", "answer": "B"}, r"\boxed{(B)}", True),
        ({"answer": ""}, "no gold answer", None),
        ({"answer": "D"}, "gold 'D' names none of its 3 options", None),
        ({"B": "nan", "C": "nan"}, "its options cannot be read", None),
        ({"image": None}, "an image is missing", None),
    ],
    "mmstar": [
        ({}, r"\boxed{B}", True),
        ({}, r"\boxed{green}", True),
        ({}, r"\boxed{B: green}", True),
        ({}, r"\boxed{A}", False),
        ({}, r"\boxed{light blue}", False),
        ({}, "B", False),
        ({"answer": "C"}, r"\boxed{light blue}", True),
        ({"question": "How many?\nChoices:\n(A) 3\n(B) 4\n(C) 5"}, r"\boxed{4}", True),
        ({"question": "How many?\nChoices:\n(A) 3\n(B) 4\n(C) 5"}, r"\boxed{5}", False),
        ({"question": "Is A: or B: right?\nOptions: A: yes, B: no"}, r"\boxed{no}", True),
        ({"question": "Is A: or B: right?\nOptions: A: yes, B: no", "answer": "A"}, r"\boxed{no}", False),
        ({"question": "Where?\nOptions: A: Paris, France, B: Rome, Italy, C: Bonn"}, r"\boxed{Rome, Italy}", True),
        ({"question": "Which colour?"}, "its options cannot be read", None),
        ({"answer": "F"}, "gold 'F' names none of its 4 options", None),
        ({"image": None}, "an image is missing", None),
    ],
    "mathverse": [
        ({}, r"\boxed{B}", True),
        ({}, r"\boxed{55°}", True),
        ({}, r"\boxed{B:55°}", True),
        ({}, r"\boxed{A}", False),
        ({}, r"\boxed{35°}", False),
        ({}, "B", False),
        ({"problem_version": "Vision Only", "query_cot": "According to the question shown in the image, reason."}, r"\boxed{B}", True),
        ({"problem_version": "Vision Only", "query_cot": "According to the question shown in the image, reason."}, r"\boxed{D}", False),
        (FREE, r"\boxed{12 \text{ cm}}", True),
        (FREE | {"answer": "12"}, r"\boxed{12}", True),
        (FREE | {"answer": "12"}, r"\boxed{21}", False),
        (FREE | {"answer": r"\sqrt{8}"}, r"\boxed{2\sqrt{2}}", True),
        (FREE | {"answer": "y=2x+1"}, r"\boxed{y=2x+1}", True),
        (FREE | {"answer": "x=5"}, r"\boxed{y=5}", False),
        (FREE | {"answer": r"Area $=9 \pi \mathrm{cm}^{2}$"}, r"\boxed{9\pi}", True),
        (FREE | {"answer": r"Area $=9 \pi \mathrm{cm}^{2}$"}, r"\boxed{6\pi}", False),
        (FREE | {"answer": r"Area $=9.4 \mathrm{~cm}^{2}$"}, r"\boxed{9.4 \text{ cm}^2}", True),
        (FREE | {"answer": r"217 ^\circ T"}, r"\boxed{217°}", True),
        (FREE | {"answer": "35掳"}, r"\boxed{35}", True),
        (FREE | {"answer": "4.4 m"}, r"\boxed{4.4}", True),
        ({"query_cot": "Choice:\nA: 3\nB: 4"}, r"\boxed{4}", True),
        ({"answer": "C\nD"}, "gold 'C\\nD' names none of its 4 options", None),
        ({"query_cot": "Question: How wide is angle D?"}, "its options cannot be read", None),
        (FREE | {"answer": ""}, "no gold answer", None),
        ({"image": None}, "an image is missing", None),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_golden_answers(name, tmp_path):
    cases = GOLDEN[name]
    assert sum(expected is not None for *_, expected in cases) >= 12
    rows = load(tmp_path, name, [change for change, *_ in cases])
    for number, (change, response, expected) in enumerate(cases):
        ready, malformed = evaluate.prepare(name, rows, [evaluate.Asked("id", "unit", "", number)])
        if expected is None:
            assert not ready and malformed[0]["malformed"] == response, change
        else:
            assert not malformed, (change, malformed)
            assert BENCHMARKS[name].right(ready[0][1], response) is expected, (change, response)


PROMPTS = {  # what the model is asked; [32] is an image of that width
    "mmmu_pro": "[64] How long is [32] in [96] ?\nOptions:\nA. 3 cm\nB. 5 cm\nC. 7 cm\nD. 10'",
    "mathvista": "[32] Hint: Please answer with one decimal place.\nQuestion: How tall is it?",
    "mathvision": "[32] How many squares?\n<image1>",
    "zerobench": "[32] [64] What is the total?",
    "wemath": "[32] How large is it?\nA. 4; B. 4.5 cm; C. 5; D. No correct answer",
    "mmbench": "[32] What is it?\nOptions:\nA. a cat\nB. a dog\nC. a fox",
    "mmstar": "[32] Which colour?\nOptions: A: dark red, B: green, C: light blue, D: none of them",
    "mathverse": "[32] Please first reason, and give the option letter, e.g., A, B, C, D, at the end.\nQuestion: How wide is angle D?\n"
                 "Choices:\nA:65°\nB:55°\nC:45°\nD:35°",
}  # fmt: skip


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompts(name, tmp_path):
    rows = load(tmp_path, name, [{}])
    (ready,), _ = evaluate.prepare(name, rows, [evaluate.Asked("id", "unit", "", 0)])
    prompt, line = ready
    images = iter(prompt.images)
    (message,) = prompt.messages
    *parts, last = [f"[{next(images).width}]" if part["type"] == "image" else part["text"] for part in message["content"]]
    assert " ".join(parts) == PROMPTS[name] and last == f"\n{BOXED}" and next(images, None) is None
    assert line["facts"].keys() == set(BENCHMARKS[name].facts)


def test_a_hint_stands_before_the_question(tmp_path):
    rows = load(tmp_path, "mmbench", [{"hint": "It barks."}])
    (ready,), _ = evaluate.prepare("mmbench", rows, [evaluate.Asked("id", "unit", "", 0)])
    assert ready[0].messages[0]["content"][1]["text"].startswith("It barks.\nWhat is it?\nOptions:")


def test_images_stand_where_they_are_mentioned_also_twice():
    images = [picture(1), None, picture(3), picture(4)]
    content, order = compose("<image 3> before <image1>, again <image 3>", images, placed=True)
    assert [image.width for image in order] == [4, 3, 1, 3]  # the one that is not mentioned comes first
    assert [part.get("text", "*") for part in content] == ["*", "*", "before", "*", ", again", "*"]
    content, order = compose("<image 2> then <image 1>", images[2:], placed=False)  # labels inside the pictures, say
    assert [image.width for image in order] == [3, 4] and content[-1]["text"] == "<image 2> then <image 1>"
    for text in ("<image 2>", "<image 9>"):
        with pytest.raises(Malformed, match="an image is missing"):
            compose(text, images, placed=True)
    with pytest.raises(Malformed, match="an image is no picture column"):
        compose("", [{"bytes": b"", "path": None}], placed=False)
    for mode in ("P", "RGBA", "L"):
        assert compose("", [Image.new(mode, (8, 8))], placed=False)[1][0].mode == "RGB"


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("A. 4; B. 4.5; C. 5", ["4", "4.5", "5"]),
        ("Which?\nOptions: A: a b, B: c, C: d e", ["a b", "c", "d e"]),
        ("Choices:\n(A) 3\n(B) 4", ["3", "4"]),
        ("A) x B) y C) z", ["x", "y", "z"]),
        ("no options here", []),
        ("B. only", []),
    ],
)
def test_lettered_options(text, options):
    assert lettered(text) == options


@pytest.mark.parametrize(
    ("parts", "strict", "loose"),
    [
        ({"1": True, "2": True, "multi": True}, 1.0, 1.0),  # complete mastery
        ({"1": True, "2": True, "multi": False}, 0.5, 0.5),  # inadequate generalisation
        ({"1": True, "2": False, "multi": True}, 0.0, 1.0),  # rote memorisation, strictly
        ({"1": False, "2": False, "multi": True}, 0.0, 0.0),  # rote memorisation
        ({"1": True, "2": False, "multi": False}, 0.0, 0.0),  # insufficient knowledge
        ({"1": True, "2": True, "3": False, "multi": True}, 0.0, 1.0),
        ({"1": True, "2": True, "3": True, "multi": False}, 0.5, 0.5),
    ],
)
def test_we_math_by_its_four_outcomes(parts, strict, loose):
    assert we_math(parts) == {"": strict, "loose": loose}


def test_another_data_set_in_a_benchmarks_place(tmp_path):
    load(tmp_path, "mmstar", [{}])
    (tmp_path / "mmstar.parquet").rename(tmp_path / "wemath.parquet")
    with pytest.raises(UsageError, match="--benchmarks wemath: its rows have no 'option'; is this We-Math/We-Math"):
        evaluate.rows_of("wemath", str(tmp_path))
    with pytest.raises(
        UsageError,
        match="holds neither one mathverse.parquet .* nor a clone mathverse/, nor mathverse/testmini-.*, for MathVerse",
    ):
        evaluate.rows_of("mathverse", str(tmp_path))


def test_a_folder_as_on_the_hub(tmp_path):
    """The split's files are read, not the other split's; a README tells configurations, as in a clone."""
    folder = tmp_path / "mmstar"
    for shard, answer in (("val-00000-of-00002", "A"), ("val-00001-of-00002", "D"), ("test-00000-of-00001", "C")):
        load(folder, "mmstar", [{"answer": answer}])
        (folder / "mmstar.parquet").rename(folder / f"{shard}.parquet")
    assert evaluate.rows_of("mmstar", str(tmp_path))["answer"] == ["A", "D"]
    for config in ("en", "cn"):
        load(tmp_path / "mmbench" / config, "mmbench", [{"question": config}])
        (tmp_path / f"mmbench/{config}/mmbench.parquet").rename(tmp_path / f"mmbench/{config}/dev-00000-of-00001.parquet")
    (tmp_path / "mmbench/README.md").write_text("---\nconfigs:\n" + "".join(
        f"- config_name: {config}\n  data_files:\n  - split: dev\n    path: {config}/dev-*\n" for config in ("cn", "en")) + "---\n")  # fmt: skip
    assert evaluate.rows_of("mmbench", str(tmp_path))["question"] == ["en"]
    (folder / "val-00000-of-00002.parquet").write_bytes(b"no parquet")
    with pytest.raises(UsageError, match="--benchmarks mmstar: MMStar, split val, cannot be had from --data-dir"):
        evaluate.rows_of("mmstar", str(tmp_path))
